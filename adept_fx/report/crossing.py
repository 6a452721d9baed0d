"""Reads off an exit-aware graph what crosses its exit points besides the hidden state."""

import operator
from collections.abc import Iterator
from typing import Any

import sympy
from torch import Tensor, fx
from torch.fx import Node

from adept_fx.graph.blocks import Block, Stage, Synthesis
from adept_fx.graph.symbols import expression
from adept_fx.ops import tokens as ops
from adept_fx.report import facts
from adept_fx.report.layers import outputs, stages
from adept_fx.report.words import named


def crossing(graph: fx.GraphModule, index: int) -> tuple[facts.Crossing, ...]:
    """What is read behind an exit point.

    Args:
        graph: The exit-aware graph.
        index: The exit point, counted from 0.
    """
    behind = list(stages(graph))[index + 1 :]
    layout, live = behind[0][0].args[:2]
    gathered = graph.graph.find_nodes(op="call_function", target=ops.gather_tokens)
    packed = [node for node in gathered if node.args[0] is layout and node is not live]
    later: Iterator[Any] = (item for call, _ in behind for item in call.args[2:])
    whole = dict.fromkeys(i for i in later if i not in gathered and not _is_synthesis(i, graph))
    names = _names(behind[0][1])
    found = [(node, "tokens") for node in packed] + [(node, "rows") for node in whole]
    return tuple(_crossing(node, kind, graph, names) for node, kind in found)


def _is_synthesis(node: Node, graph: fx.GraphModule) -> bool:
    module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    return isinstance(module, Synthesis)


def _names(stage: Stage) -> dict[sympy.Expr, str]:
    """What the symbols of sizes are called: the second input of a stage is ``[B, S, D]``."""
    hidden = stage.graph.graph.find_nodes(op="placeholder")[1].meta["val"]
    batch, tokens = (expression(size) for size in hidden.shape[:2])
    return {batch: "B", tokens: "S"}


def _crossing(
    node: Node, layout: str, graph: fx.GraphModule, names: dict[sympy.Expr, str]
) -> facts.Crossing:
    while node.target is ops.gather_tokens:
        node = node.args[1]  # type: ignore[assignment]
    origin, value = _origin(node, graph)
    shape = tuple(_size(size, names) for size in value.shape) if value is not None else None
    return facts.Crossing(node.name, shape, origin, layout)


def _origin(node: Node, graph: fx.GraphModule) -> tuple[str, Tensor | None]:
    """Who computes a value, and an example of it."""
    if node.target is operator.getitem:
        call, at = node.args
        block = graph.get_submodule(str(call.target))  # type: ignore[union-attr]
        if isinstance(block, Block):
            origin = named("layer", block.layers) if isinstance(block, Stage) else "prologue"
            return origin, outputs(block)[at].meta.get("val")  # type: ignore[index]
    for user in node.users:
        reader = graph.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(reader, Block):
            at = user.args.index(node) - isinstance(reader, Synthesis)
            return "call", reader.graph.graph.find_nodes(op="placeholder")[at].meta.get("val")
    return "call", None


def _size(size: Any, names: dict[sympy.Expr, str]) -> int | str:
    expr = expression(size)
    if expr.is_Integer:
        return int(expr)
    if not all(part.is_Atom for part in expr.args):
        return "?"
    return str(expr.subs({s: sympy.Symbol(names.get(s, "T")) for s in expr.free_symbols}))
