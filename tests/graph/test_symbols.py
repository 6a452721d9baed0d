"""Which axes of a value are token axes, read off its shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from adept_fx.graph.symbols import (
    Symbols,
    TokenAxes,
    ancestors,
    expression,
    free_symbols,
    is_hidden,
    is_own_size,
    is_scalar,
    token_axes,
)


class Sizes(NamedTuple):
    b: Any
    s: Any
    r: Any
    t: Any


@cache
def world() -> tuple[FakeTensorMode, Sizes, Symbols]:
    """Fake tensors with a symbol each for batch, tokens, rows and keys."""

    class Entry(nn.Module):
        def forward(self, states: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
            return states + 1, slots + 1

    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    program = torch.export.export(
        Entry(), (torch.zeros(3, 5, 8), torch.zeros(17, 12)), dynamic_shapes=(free, free)
    )
    states, slots = (n.meta["val"] for n in program.graph.find_nodes(op="placeholder"))
    (b, s, _), (r, t) = states.shape, slots.shape
    batch, tokens, rows, length = (expression(size) for size in (b, s, r, t))
    symbols = Symbols(batch, tokens, rows, length, frozenset({length}))
    mode: FakeTensorMode = states.fake_mode
    assert isinstance(mode.shape_env, ShapeEnv)
    return mode, Sizes(b, s, r, t), symbols


def fake(shape: Callable[[Sizes], tuple[Any, ...]]) -> Tensor:
    mode, sizes, _ = world()
    with mode:
        return torch.empty(shape(sizes))


H, D = 4, 8
SHAPES: list[tuple[str, Callable[[Sizes], tuple[Any, ...]], TokenAxes]] = [
    ("hidden", lambda x: (x.b, x.s, D), TokenAxes(batch=0, token=1)),
    ("heads", lambda x: (x.b, H, x.s, D), TokenAxes(batch=0, token=2)),
    ("heads behind", lambda x: (x.b, x.s, H, D), TokenAxes(batch=0, token=1)),
    ("rotary tables of all rows", lambda x: (1, x.s, D), TokenAxes(token=1)),
    ("positions", lambda x: (x.b, x.s), TokenAxes(batch=0, token=1)),
    ("time first", lambda x: (x.s, x.b, D), TokenAxes(batch=1, token=0)),
    ("positions of all rows", lambda x: (x.s,), TokenAxes(token=0)),
    ("packed", lambda x: (x.b * x.s, D), TokenAxes(flat=0)),
    ("experts", lambda x: (H, x.b * x.s), TokenAxes(flat=1)),
    ("merged heads", lambda x: (x.b * H, x.s, D), TokenAxes(batch=0, token=1, inner=H)),
    ("merged, turned", lambda x: (x.b * H, D, x.s), TokenAxes(batch=0, token=2, inner=H)),
    ("mask", lambda x: (x.b, 1, x.s, x.t), TokenAxes(batch=0, token=2)),
    ("alibi", lambda x: (x.b * H, 1, x.t), TokenAxes(batch=0, inner=H)),
    ("per row", lambda x: (x.b, D), TokenAxes(batch=0)),
    ("cached keys", lambda x: (x.r, H, x.t, D), TokenAxes()),
    ("key positions", lambda x: (x.t,), TokenAxes()),
    ("weight", lambda x: (D, H), TokenAxes()),
    ("number", lambda x: (), TokenAxes()),
]


@pytest.mark.parametrize(("shape", "axes"), [s[1:] for s in SHAPES], ids=[s[0] for s in SHAPES])
def test_token_axes(shape: Callable[[Sizes], tuple[Any, ...]], axes: TokenAxes) -> None:
    found = token_axes(fake(shape), world()[2])
    assert found == axes
    assert bool(found) == (axes != TokenAxes())
    assert found.aligned == (axes.token is not None or axes.flat is not None)


@pytest.mark.parametrize("value", [None, 3, (1, 2), "text"])
def test_only_tensors_have_token_axes(value: object) -> None:
    assert not token_axes(value, world()[2])


def test_tied_rows_are_batch_rows() -> None:
    _, sizes, symbols = world()
    tied = Symbols(symbols.batch, symbols.tokens, symbols.batch, symbols.past, symbols.keys)
    assert token_axes(fake(lambda x: (x.b, H, x.t, D)), tied) == TokenAxes(batch=0)
    assert expression(sizes.b * 2) == 2 * tied.batch


@pytest.mark.parametrize(
    ("shape", "hidden"),
    [
        (lambda x: (x.b, x.s, D), True),
        (lambda x: (x.s, x.b, D), False),
        (lambda x: (x.b, x.s), False),
        (lambda x: (x.b * H, x.s, D), False),
        (lambda x: (1, x.s, D), False),
        (lambda x: (x.r, x.s, D), False),
    ],
)
def test_is_hidden(shape: Callable[[Sizes], tuple[Any, ...]], hidden: bool) -> None:
    assert is_hidden(_node(fake(shape)), world()[2]) == hidden


def _node(value: object) -> fx.Node:
    node = fx.Graph().placeholder("x")
    node.meta["val"] = value
    return node


def test_sizes_of_tokens_are_computed_where_they_are_needed() -> None:
    _, (b, s, r, t), symbols = world()
    assert all(is_own_size(_node(size), symbols) for size in (b, s, r, b * s, s * 2 + 1))
    assert not any(is_own_size(_node(item), symbols) for item in (t, b * t, 3, fake(lambda x: ())))
    assert is_own_size(_node(t), symbols, symbols.keys)
    assert all(is_scalar(_node(item)) for item in (b, t, 3, 1.5, True))
    assert not is_scalar(_node(fake(lambda x: (x.b,))))


def test_free_symbols() -> None:
    _, (b, s, _, t), symbols = world()
    assert free_symbols(fake(lambda x: (x.b * x.s, D))) == {symbols.batch, symbols.tokens}
    assert free_symbols(b * t) == {symbols.batch, *symbols.keys}
    assert free_symbols((fake(lambda x: (x.s,)), [s, 3])) == {symbols.tokens}
    assert free_symbols(()) == free_symbols(3) == set()
    assert expression(3) == 3


def test_ancestors() -> None:
    graph = fx.Graph()
    one, two = graph.placeholder("one"), graph.placeholder("two")
    left = graph.call_function(torch.neg, (one,))
    both = graph.call_function(torch.add, (left, two))
    other = graph.call_function(torch.neg, (both,))
    assert ancestors([both]) == {one, two, left, both}
    assert ancestors([left, two]) == {one, two, left}
    assert other not in ancestors([both])
