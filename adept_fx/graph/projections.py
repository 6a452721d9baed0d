"""Cuts unused output columns off fused projections.

A slice that needs keys and values of ``linear(x, W_qkv)`` needs not compute queries. Which columns
it needs is found by sending column numbers through the views, slices and transposes that follow,
whatever the model's layout.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node
from torch.fx.node import map_arg

from adept_fx.graph import meta
from adept_fx.graph.symbols import Symbols, TokenAxes, expression, token_axes
from adept_fx.ops.project import project_heads

_aten = torch.ops.aten
_MOVES = {
    _aten.reshape.default,
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.chunk.default,
    _aten.unbind.int,
    _aten.select.int,
    _aten.transpose.int,
    _aten.permute.default,
    _aten.unsqueeze.default,
    _aten.unflatten.int,
    _aten.contiguous.default,
    _aten.clone.default,
    operator.getitem,
}


@dataclass(frozen=True)
class _Projection:
    """``states @ weight (+ bias)``; ``transposed`` weights are ``[O, D]``."""

    node: Node
    states: Node
    weight: Node
    bias: Node | None
    transposed: bool


@dataclass(frozen=True)
class _Columns:
    """``count`` groups of ``size`` columns, ``stride`` apart, the first one at ``start``."""

    start: int
    size: int
    stride: int
    count: int

    def tiles(self, width: int) -> bool:
        """Whether one group lies in every ``stride`` columns, or there is one group only."""
        return self.count == 1 or (self.start < self.stride and self.count * self.stride == width)


def cut_unused_columns(module: fx.GraphModule, symbols: Symbols) -> int:
    """Replaces every projection of which some columns are unused by smaller ones.

    Returns:
        Number of projections that were cut.
    """
    projections = [p for node in module.graph.nodes if (p := _projection(node)) is not None]
    cut = sum(_cut(module.graph, projection, symbols) for projection in projections)
    if cut:
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
    return cut


def _projection(node: Node) -> _Projection | None:
    if node.target is _aten.linear.default:
        found = _Projection(node, *_padded(node.args), transposed=True)
    elif node.target is _aten.addmm.default and not node.kwargs:
        bias, states, weight = node.args
        found = _Projection(node, states, weight, bias, transposed=False)  # type: ignore[arg-type]
    else:
        return None
    owned = [found.weight, *([found.bias] if found.bias is not None else [])]
    return found if all(meta.get(item).source is not None for item in owned) else None


def _padded(args: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    return (args[0], args[1], args[2] if len(args) > 2 else None)


def _cut(graph: fx.Graph, projection: _Projection, symbols: Symbols) -> bool:
    frontier = _frontier(projection.node)
    if frontier is None or projection.node in frontier:
        return False
    width = int(projection.node.meta["val"].shape[-1])
    wanted: dict[Node, _Columns] = {}
    for value in frontier:
        columns = _columns(_numbers(value, projection.node, symbols), value, symbols)
        if columns is None or not columns.tiles(width):
            return False
        wanted[value] = columns
    if sum(item.size * item.count for item in wanted.values()) >= width:
        return False
    for value, item in wanted.items():
        with graph.inserting_before(value):
            smaller = _smaller(graph, projection, item)
            shaped = _shaped(graph, smaller, value, symbols)
        shaped.meta = dict(value.meta)
        value.replace_all_uses_with(shaped)
    return True


def _frontier(start: Node) -> list[Node] | None:
    """The first values on each way that something computes with, behind nothing but moves."""
    found: dict[Node, None] = {}
    stack = [start]
    while stack:
        node = stack.pop()
        if all(user.target in _MOVES for user in node.users):
            stack.extend(node.users)
        elif isinstance(node.meta["val"], Tensor):
            found[node] = None
        else:
            return None
    return list(found)


def _numbers(value: Node, start: Node, symbols: Symbols) -> Tensor:
    """The column numbers that end up in ``value``, for one row and one token."""
    single = {symbols.batch: 1, symbols.tokens: 1}

    def concrete(item: Node) -> Any:
        if item in done:
            return done[item]
        size = item.meta.get("val")
        return int(expression(size).subs(single))  # type: ignore[arg-type]

    width = int(start.meta["val"].shape[-1])
    shape = [int(expression(size).subs(single)) for size in start.meta["val"].shape]
    done: dict[Node, Any] = {start: torch.arange(width).view(shape)}
    path: list[Node] = []
    node = value
    while node is not start:
        path.append(node)
        node = next(i for i in node.all_input_nodes if i.target in _MOVES or i is start)
    for step in reversed(path):
        arguments, keywords = map_arg(step.args, concrete), map_arg(step.kwargs, concrete)
        done[step] = step.target(*arguments, **keywords)  # type: ignore[operator]
    result: Tensor = done[value]
    return result


def _columns(numbers: Tensor, value: Node, symbols: Symbols) -> _Columns | None:
    axes = token_axes(value.meta["val"], symbols)
    if not axes.aligned or axes.inner != 1:
        return None
    flat = numbers.flatten()
    steps = flat.diff()
    jumps = (steps != 1).nonzero().flatten()
    if not jumps.numel():
        return _Columns(int(flat[0]) if flat.numel() else 0, flat.numel(), flat.numel(), 1)
    size = int(jumps[0]) + 1
    if flat.numel() % size:
        return None
    groups = flat.view(-1, size)
    stride = int(groups[1, 0] - groups[0, 0])
    first = groups[0, 0]
    regular = first + stride * torch.arange(len(groups))[:, None] + torch.arange(size)
    return _Columns(int(first), size, stride, len(groups)) if groups.equal(regular) else None


def _smaller(graph: fx.Graph, projection: _Projection, columns: _Columns) -> Node:
    """The projection onto these columns alone."""
    weight, bias, states = projection.weight, projection.bias, projection.states
    if columns.count > 1:
        if not projection.transposed:
            weight = graph.call_function(_aten.t.default, (weight,))
        arguments = (states, weight, bias, columns.start, columns.size, columns.stride)
        return graph.call_function(project_heads, arguments)
    stop = columns.start + columns.size
    axis = 0 if projection.transposed else 1
    part = graph.call_function(_aten.slice.Tensor, (weight, axis, columns.start, stop))
    if bias is not None:
        bias = graph.call_function(_aten.slice.Tensor, (bias, 0, columns.start, stop))
    if projection.transposed:
        return graph.call_function(_aten.linear.default, (states, part, bias))
    return graph.call_function(_aten.addmm.default, (bias, states, part))


def _shaped(graph: fx.Graph, smaller: Node, value: Node, symbols: Symbols) -> Node:
    """Gives the columns the shape and the order of axes that ``value`` had."""
    shape = value.meta["val"].shape
    axes: TokenAxes = token_axes(value.meta["val"], symbols)
    hidden = next(iter(graph.nodes))  # [B, S, D]
    named = ((axes.batch, hidden, 0), (axes.token, hidden, 1), (axes.flat, smaller, 0))
    front = [axis for axis, _, _ in named if axis is not None]
    rest = [axis for axis in range(len(shape)) if axis not in front]
    sizes = [
        graph.call_function(_aten.sym_size.int, (source, at))
        for axis, source, at in named
        if axis is not None
    ]
    order = [*front, *rest]
    laid_out = graph.call_function(
        _aten.reshape.default, (smaller, [*sizes, *(int(shape[axis]) for axis in rest)])
    )
    back = [order.index(axis) for axis in range(len(shape))]
    return graph.call_function(_aten.permute.default, (laid_out, back))
