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
