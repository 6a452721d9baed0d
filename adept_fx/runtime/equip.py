"""Gets gates ready for the program that asks them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from adept_fx.gates.base import Gate
from adept_fx.graph.blocks import Stage
from adept_fx.pipeline import Program
from adept_fx.runtime.gate_inputs import wanted
from adept_fx.runtime.head import Head


def asks_program(gate: Gate) -> bool:
    """Whether a gate cannot be used before it was equipped."""
    return type(gate).set_sizes is not Gate.set_sizes or "draft" in gate.needs


def equip(gates: Sequence[Gate], program: Program, head: Head) -> None:
    """Tells gates the sizes of what they will be given, and tries whether they can be given it.

    Args:
        gates: One per exit point.
        program: A program that was captured for these gates' needs.
        head: The model's head.

    Raises:
        ConfigError: A gate was made for other sizes.
        UnsupportedModelError: The model cannot give a gate what it asks for.
    """
    for index, gate in enumerate(gates):
        if type(gate).set_sizes is not Gate.set_sizes:
            gate.set_sizes(sizes(program, index, gate.needs))
    if any("draft" in gate.needs for gate in gates):
        norm: Any = program.graph.epilogue
        weight = head.decoder.get_input_embeddings().weight  # type: ignore[operator]
        width = sizes(program, 0, frozenset())["hidden"]
        states = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
        dtype = _dtype(head.decoder, weight.dtype)
        head.check_rows(norm, states.to(weight.device, dtype), program.output_type)


def _dtype(decoder: nn.Module, other: torch.dtype) -> torch.dtype:
    dtype = getattr(decoder, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else other


def sizes(program: Program, exit_index: int, needs: frozenset[str]) -> dict[str, int]:
    """Numbers per token of the hidden state and of each feature at an exit point.

    They are read off the graph: neither names nor a config tell them of every model.
    """
    stages = [block for block in program.graph.children() if isinstance(block, Stage)]
    output: Any = next(iter(stages[exit_index].graph.graph.find_nodes(op="output"))).args[0]
    values = output if isinstance(output, (tuple, list)) else (output,)
    names = ["hidden", *wanted(needs)]
    found = {}
    for name, node in zip(names, values, strict=False):  # behind them: what crosses the exit
        shape = node.meta["val"].shape
        # [B, S, D] of states, [B, heads, S, D] of queries, keys and values
        heads = int(shape[1]) if len(shape) == 4 else 1
        found[name] = heads * int(shape[-1])
    return found
