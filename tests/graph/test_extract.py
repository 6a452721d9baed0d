"""Parts of a graph compute their sizes from their own inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.fx import Node
from torch.utils._sympy.functions import FloorDiv, Mod

from adept_fx.errors import PassError
from adept_fx.graph import meta
from adept_fx.graph.extract import Extraction, needed
from adept_fx.graph.symbols import Symbols, expression

WIDTH = 4


class Experts(nn.Module):
    """Packs tokens, as expert layers do, and reads its own sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, states: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, tokens, _ = states.shape
        flat = states.reshape(batch * tokens, WIDTH) @ self.weight
        mixed = (flat * 2 + flat * 2).reshape(batch, tokens, WIDTH)
        heads = states.reshape(batch, tokens, 2, 2).transpose(1, 2).reshape(batch * 2, tokens, 2)
        return mixed, heads, torch.full((keys.shape[1],), 2.0), flat


@cache
def flat_graph() -> tuple[fx.Graph, Symbols, nn.Module]:
    model = Experts()
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    example = (torch.zeros(3, 5, WIDTH), torch.zeros(17, 12))
    with torch.no_grad():
        program = torch.export.export(model, example, dynamic_shapes=(free, free))
    weight, states, keys = program.graph.find_nodes(op="placeholder")
    meta.update(weight, source="weight")
    sizes = (*states.meta["val"].shape[:2], *keys.meta["val"].shape)
    batch, tokens, rows, length = (expression(size) for size in sizes)
    return program.graph, Symbols(batch, tokens, rows, length, frozenset({length})), model


def inputs() -> tuple[Node, Node, tuple[Node, ...]]:
    graph = flat_graph()[0]
    _, states, keys = graph.find_nodes(op="placeholder")
    outputs: Any = graph.output_node().args[0]
    return states, keys, tuple(outputs)


def order() -> dict[Node, int]:
    return {node: at for at, node in enumerate(flat_graph()[0].nodes)}


def extract(start: Node, outputs: list[Node], **options: bool) -> tuple[fx.GraphModule, Extraction]:
    _, symbols, _ = flat_graph()
    part = Extraction(symbols, **options)
    part.add_input(start)
    part.copy(needed(outputs, {start}, order(), symbols))
    return part.finish(tuple(outputs)), part


@pytest.mark.parametrize("shape", [(3, 5), (1, 2), (1, 11)])
def test_a_compacted_part_computes_with_compacted_sizes(shape: tuple[int, int]) -> None:
    states, _, (mixed, heads, _, _) = inputs()
    model: Any = flat_graph()[2]
    module, part = extract(states, [mixed, heads])
    live = torch.randn(*shape, WIDTH)
    with torch.no_grad():
        found = module(live, model.weight)
        wanted = model(live, torch.zeros(17, 12))
    assert found[0].equal(wanted[0])
    assert found[1].equal(wanted[1])
    assert [node.name for node in part.inputs] == ["states"]
    assert [meta.get(node).source for node in part.sources] == ["weight"]
    assert next(n.name for n in module.graph.find_nodes(op="placeholder")) == "states"


def test_no_size_is_passed_in() -> None:
    states, _, (mixed, *_) = inputs()
    module, _ = extract(states, [mixed])
    placeholders = module.graph.find_nodes(op="placeholder")
    assert all(isinstance(node.meta["val"], Tensor) for node in placeholders)
    assert module.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)


def test_equal_expressions_are_computed_once_on_request() -> None:
    states, _, (mixed, *_) = inputs()
    twice = torch.ops.aten.mul.Tensor
    plain, _ = extract(states, [mixed])
    merged, _ = extract(states, [mixed], merge=True)
    counts = [len(m.graph.find_nodes(op="call_function", target=twice)) for m in (plain, merged)]
    assert counts == [2, 1]
    live, weight = torch.randn(2, 3, WIDTH), torch.randn(WIDTH, WIDTH)
    assert plain(live, weight)[0].equal(merged(live, weight)[0])


def test_random_calls_are_never_merged() -> None:
    graph = fx.Graph()
    start = graph.placeholder("start")
    draws = [graph.call_function(torch.ops.aten.rand_like.default, (start,)) for _ in range(2)]
    part = Extraction(flat_graph()[1], merge=True)
    part.add_input(start)
    part.copy(draws)
    left, right = part.finish(tuple(draws))(torch.zeros(8))
    assert not left.equal(right)


def test_numbers_of_another_kind_are_not_merged() -> None:
    graph = fx.Graph()
    start = graph.placeholder("start")
    full = torch.ops.aten.add.Tensor
    sums = [graph.call_function(full, (start, number)) for number in (1, 1.0, True)]
    part = Extraction(flat_graph()[1], merge=True)
    part.add_input(start)
    part.copy(sums)
    found = part.finish(tuple(sums))(torch.zeros(2, dtype=torch.long))
    assert [item.dtype for item in found] == [torch.long, torch.float32, torch.long]


def test_key_lengths_belong_to_parts_that_see_keys_only() -> None:
    _, keys, (_, _, counted, _) = inputs()
    module, _ = extract(keys, [counted], keys=True)
    assert module(torch.zeros(2, 9))[0].equal(torch.full((9,), 2.0))


def test_a_value_that_is_no_input_is_an_error() -> None:
    states, keys, (mixed, _, counted, flat) = inputs()
    part = Extraction(flat_graph()[1])
    part.add_input(states)
    with pytest.raises(PassError, match=f"{flat.name} is needed by a part"):
        part.finish(flat)
    with pytest.raises(PassError, match="is no input of"):
        part.copy([mixed])
    assert counted not in part.copies
    assert keys not in part.copies


def test_a_size_that_no_input_has_is_an_error() -> None:
    _, symbols, _ = flat_graph()
    _, _, (_, _, _, flat) = inputs()
    part = Extraction(symbols)
    part.add_input(flat)  # [B * S, D]
    with pytest.raises(PassError, match=f"no input .* has an axis of size {symbols.batch}"):
        part.size(symbols.batch)


SIZES: list[Callable[[Any, Any], Any]] = [
    lambda b, s: b * s,
    lambda b, s: 2 * b * s + 1,
    lambda b, s: b + s - 1,
    lambda b, s: s**2,
    lambda b, s: FloorDiv(b * s, 2),
    lambda b, s: Mod(s, 2),
    lambda b, s: sympy.Max(b, s),
    lambda b, s: sympy.Integer(7),
]


@pytest.mark.parametrize("expr", SIZES)
def test_arithmetic_of_sizes(expr: Callable[[Any, Any], Any]) -> None:
    _, symbols, _ = flat_graph()
    states, *_ = inputs()
    size = expr(symbols.batch, symbols.tokens)
    wanted = size.subs({symbols.batch: 2, symbols.tokens: 9})
    assert _value(states, size, torch.zeros(2, 9, WIDTH)) == int(wanted)


def test_merged_heads_give_the_batch() -> None:
    _, symbols, _ = flat_graph()
    _, _, (_, heads, _, _) = inputs()
    assert _value(heads, symbols.batch, torch.zeros(6, 5, 2)) == 3


def _value(outer: Node, size: sympy.Expr, given: Tensor) -> Any:
    """The size as a part with that one input computes it."""
    part = Extraction(flat_graph()[1])
    part.add_input(outer)
    key = fx.Graph().placeholder("size")
    part.copies[key] = part.size(size)
    return part.finish((key,))(given)[0]
