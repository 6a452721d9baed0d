"""Projects onto some of a fused projection's output columns."""

import torch
import torch.nn.functional as F
from torch import Tensor


def project_heads(
    states: Tensor, weight: Tensor, bias: Tensor | None, start: int, size: int, stride: int
) -> Tensor:
    """Computes ``size`` outputs of every group of ``stride``, from ``start`` on.

    Equivalent to ``linear(states, weight, bias).unflatten(-1, (-1, stride))[..., start:start +
    size].flatten(-2)``, without the other outputs. Fused query-key-value projections that store
    the three head by head (GPT-NeoX, BLOOM) need it: their key columns are no block.

    Args:
        states: ``[..., D]``.
        weight: ``[O, D]``; ``O`` is a multiple of ``stride``.
        bias: ``[O]`` or None.
        start: First output of each group.
        size: Outputs per group.
        stride: Size of a group.
    """
    groups = weight.unflatten(0, (-1, stride))[:, start : start + size]
    chosen = None if bias is None else bias.unflatten(0, (-1, stride))[:, start : start + size]
    if weight.dtype != torch.float32 and weight.device.type == "cpu":
        # Measured (16 heads of 64, D 1024, one core): batched bf16 GEMM on CPU is ten times slower
        # than packing the rows first; in float32 it is the faster one.
        packed = None if chosen is None else chosen.reshape(-1)
        return F.linear(states, groups.reshape(-1, weight.shape[1]), packed)
    flat = states.reshape(-1, states.shape[-1])
    heads = torch.matmul(flat, groups.transpose(1, 2))
    if chosen is not None:
        heads = heads + chosen.unsqueeze(1)
    return heads.transpose(0, 1).reshape(*states.shape[:-1], -1)


# Measured on one and two cores of an x86-64 server, 8 layers, D 256 to 4096: in bf16 one batched
# GEMM takes 0.4 to 0.9 of the loop's time up to 16 tokens, as much or more beyond; in float32 it
# gains nothing at any size. On CUDA one launch replaces many.
_BATCHED_TOKENS = 16


def project_layers(
    states: list[Tensor], weights: list[Tensor], biases: list[Tensor] | None
) -> list[Tensor]:
    """One projection per layer: ``[linear(x, w, b) for x, w, b in zip(...)]``.

    Args:
        states: Per layer ``[..., D]``, all of one shape.
        weights: Per layer ``[O, D]``.
        biases: Per layer ``[O]``, or None.
    """
    chosen = biases if biases is not None else [None] * len(weights)
    return [F.linear(x, w, b) for x, w, b in zip(states, weights, chosen, strict=True)]


def project_stacked(
    states: list[Tensor], stack: Tensor, biases: list[Tensor] | None
) -> list[Tensor]:
    """:func:`project_layers` on weights that lie in one buffer ``[L, O, D]``.

    Takes one batched GEMM where that measures faster, the loop elsewhere.
    """
    tokens = states[0].numel() // states[0].shape[-1]
    small = stack.dtype != torch.float32 and tokens <= _BATCHED_TOKENS
    if not small and stack.device.type == "cpu":
        return project_layers(states, list(stack.unbind(0)), biases)
    flat = torch.stack([state.reshape(tokens, -1) for state in states])
    result = torch.bmm(flat, stack.transpose(1, 2))
    if biases is not None:
        result = result + torch.stack(biases).unsqueeze(1)
    return [part.reshape(*states[0].shape[:-1], -1) for part in result.unbind(0)]
