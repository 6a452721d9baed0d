"""One view of keys and values, index keys and recurrent state."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx import Node

from adept_fx.graph import meta
from adept_fx.graph.meta import PROLOGUE
from adept_fx.graph.writes import (
    INDEX,
    MIXER,
    WRITE,
    add_synthesized,
    cache_write,
    data_inputs,
    is_cached,
    is_write,
    mixer_inputs,
    slot,
    synthesized,
    writes,
    written,
)


class Written(NamedTuple):
    graph: fx.Graph
    inputs: dict[str, Node]
    kv: Node
    indexer: Node
    mixer: Node


def each_kind() -> Written:
    """A graph that writes all three."""
    graph = fx.Graph()
    names = ("key", "value", "slots", "state", "mask")
    inputs = {name: graph.placeholder(name) for name in names}
    key, value, slots, state, mask = inputs.values()
    meta.update(mask, layer=PROLOGUE)
    kv = graph.call_function(WRITE, (key, value, slots, 3, []))
    index = graph.call_function(INDEX, (key, slots, 2, []))
    mixer = graph.call_function(MIXER, ([state, mask], 8, 0, -1, 5, []))
    return Written(graph, inputs, kv, index, mixer)


def test_each_kind_has_a_slot_of_its_own() -> None:
    made = each_kind()
    assert writes(made.graph.nodes) == [made.kv, made.indexer, made.mixer]
    assert [slot(node) for node in writes(made.graph.nodes)] == ["kv_3", "indexer_2", "mixer_5"]
    assert not any(is_write(node) for node in made.inputs.values())


def test_what_is_written_has_one_entry_per_token() -> None:
    made = each_kind()
    named = made.inputs
    assert written(made.kv) == [named["key"], named["value"]]
    assert written(made.indexer) == [named["key"]]
    assert written(made.mixer) == [named["state"]], "a mask comes from before the layers"
    assert mixer_inputs(made.mixer) == [named["state"], named["mask"]]


def test_synthesized_values_are_added_behind_those_of_earlier_exits() -> None:
    for node in each_kind()[2:]:
        assert isinstance(node, Node)
        assert synthesized(node) == []
        first, second = (node.graph.placeholder(name) for name in ("first", "second"))
        add_synthesized(node, [first])
        add_synthesized(node, [second])
        assert synthesized(node) == [first, second]
        assert first not in written(node) + data_inputs(node)


def test_cached_keys_are_told_from_other_values() -> None:
    made = each_kind()
    keys = made.graph.call_function(operator.getitem, (made.kv, 0))
    half = made.graph.call_function(operator.getitem, (made.mixer, 0))
    assert is_cached(keys)
    assert is_cached(made.indexer)
    assert not is_cached(made.mixer)
    assert not is_cached(half)
    assert not is_cached(made.inputs["key"])
    assert cache_write(keys) is made.kv
    assert cache_write(made.indexer) is made.indexer


def test_lowered_ops_read_neither_probes_nor_gates() -> None:
    made = each_kind()
    named = made.inputs
    assert data_inputs(made.kv) == [named["key"], named["value"]]
    assert data_inputs(made.indexer) == [named["key"]]
    assert data_inputs(made.mixer) == [named["state"], named["mask"]]
    freeze: Any = torch.ops.adept_fx.freeze.default
    kept = made.graph.call_function(freeze, (named["state"], named["key"], named["mask"]))
    assert data_inputs(kept) == [named["state"], named["key"]]
    total = made.graph.call_function(torch.ops.aten.add.Tensor, (named["key"], named["value"]))
    assert data_inputs(total) == [named["key"], named["value"]]
