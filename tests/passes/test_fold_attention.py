"""`fold_attention`: one call per layer sees cached keys."""

from __future__ import annotations

import operator

import pytest
import torch
from torch.fx import Node

from adept_fx.errors import UnsupportedModelError
from adept_fx.graph.base import Work
from adept_fx.graph.runner import run_passes
from adept_fx.graph.symbols import free_symbols
from adept_fx.passes.fold_attention import FoldAttention

from .check import assert_caught, aten, before, check_pass, each_model, insert, put_behind, write

ATTENTION = torch.ops.adept_fx.attention.default
_WRITE = torch.ops.adept_fx.cache_write.default
_getitem = operator.getitem


@each_model
def test_counts(kind: str, layers: int) -> None:
    work = before(FoldAttention, kind, layers)
    markers = len(work.find(ATTENTION))
    assert check_pass(FoldAttention, work) == {"regions": layers, "folded": layers}
    assert len(work.graph.graph.find_nodes(op="call_module")) == layers
    assert sorted(work.queries) == list(range(markers))
    assert not work.find(ATTENTION)


@each_model
def test_keys_stay_in_their_region(kind: str, layers: int) -> None:
    work = before(FoldAttention, kind, layers)
    run_passes(work, [FoldAttention()])
    for node in work.graph.graph.nodes:
        keyed = free_symbols(node.meta.get("val")) & work.symbols.keys
        if keyed and node.op == "call_function" and node.target is not _WRITE:
            readers = {user.op for user in node.users}
            cached = node.args[0] in work.find(_WRITE)
            assert not cached or readers == {"call_module"}, node.format_node()


def test_keys_of_another_layer_are_refused() -> None:
    work = before(FoldAttention, "llama", 3)
    first, last = work.find(ATTENTION)[0], work.find(ATTENTION)[2]
    last.update_arg(1, first.args[1])
    with pytest.raises(UnsupportedModelError, match="keys of layer 0 are read by another layer"):
        run_passes(work, [FoldAttention()])


def _keys(work: Work) -> Node:
    return next(node for node in work.find(_getitem) if node.args == (write(work, 1), 0))


def _read_outside(work: Work) -> None:
    insert(_keys(work), aten.neg.default, _keys(work))


def _unfold(work: Work) -> None:
    put_behind(_keys(work), aten.neg.default)


def _extra_region(work: Work) -> None:
    region = work.graph.graph.find_nodes(op="call_module")[0]
    with work.graph.graph.inserting_after(region):
        twin = work.graph.graph.call_module("attention_0", region.args)
    twin.meta = dict(region.meta)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_read_outside, "keys of cache layer 1 are read outside"),
        (_unfold, "keys of cache layer 1 are read outside"),
        (_extra_region, "attention|outside"),
    ],
)
def test_a_broken_guarantee_is_caught(spoil, match: str) -> None:  # type: ignore[no-untyped-def]
    assert_caught(FoldAttention, before(FoldAttention, "llama", 3), spoil, match)
