"""`fold_attention`: one call per layer sees cached keys."""

from __future__ import annotations

import operator

import pytest
import torch
from torch.fx import Node

from adept_fx.errors import UnsupportedModelError
from adept_fx.graph import meta
from adept_fx.graph.base import Work
from adept_fx.graph.runner import run_passes
from adept_fx.graph.symbols import free_symbols
from adept_fx.ops.attention import Attention
from adept_fx.passes.fold_attention import FoldAttention
from toys import LAYERS, Twice, work_of

from .check import (
    assert_caught,
    aten,
    before,
    border,
    check_pass,
    each_model,
    insert,
    put_behind,
    write,
)

ATTENTION = torch.ops.adept_fx.attention.default
_WRITE = torch.ops.adept_fx.cache_write.default
_getitem = operator.getitem


@each_model
def test_counts(kind: str, layers: int) -> None:
    work = before(FoldAttention, kind, layers)
    markers = len(work.find(ATTENTION))
    assert check_pass(FoldAttention, work) == {"writes": layers, "folded": layers}
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


def test_a_layer_that_attends_twice_has_one_region_with_two_results() -> None:
    work = work_of(Twice, FoldAttention)
    scales = [call.keywords["scaling"] for call in work.attentions]
    assert check_pass(FoldAttention, work) == {"writes": LAYERS, "folded": LAYERS}
    for layer, call in enumerate(work.graph.graph.find_nodes(op="call_module")):
        results = list(call.users)
        assert [(node.target, node.args[1]) for node in results] == [(_getitem, 0), (_getitem, 1)]
        assert len(call.meta["val"]) == 2
        region = work.graph.get_submodule(str(call.target))
        found = [
            m.call[0].keywords["scaling"] for m in region.modules() if isinstance(m, Attention)
        ]
        assert found == scales[2 * layer : 2 * layer + 2]
        assert found[1] == pytest.approx(3 * found[0])


def test_a_layer_may_read_the_keys_of_an_earlier_one() -> None:
    work = before(FoldAttention, "llama", 3)
    first, last = work.find(ATTENTION)[0], work.find(ATTENTION)[2]
    last.args = (last.args[0], *first.args[1:3], *last.args[3:])
    check_pass(FoldAttention, work)
    regions = work.graph.graph.find_nodes(op="call_module")
    assert [meta.get(call).layer for call in regions] == [0, 1, 2]
    assert regions[2].args[:2] == regions[0].args[:2]
    assert [call.args[0].args[0].args[3] for call in regions] == [0, 1, 0]
    assert work.queries == {at: (f"attention_{at}", 2) for at in range(3)}


def test_a_long_value_that_comes_from_no_cached_keys_is_refused() -> None:
    work = before(FoldAttention, "llama", 3)
    state = border(work, 1)
    long = insert(state, aten.neg.default, write(work, 0).args[2], like=state)
    total = insert(long, aten.sum.default, long, like=state)
    moved = insert(total, aten.add.Tensor, state, total, like=state)
    state.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
    with pytest.raises(UnsupportedModelError, match=r"neg.* of layer 0 is as long as the keys"):
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


def _long_value(work: Work) -> None:
    state = border(work, 1)
    insert(state, aten.neg.default, write(work, 0).args[2], like=state)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_read_outside, "kv_1 is read outside of a region, by neg"),
        (_unfold, "kv_1 is read outside of a region, by neg"),
        (_extra_region, "two regions of layer 0 read kv_0"),
        (_long_value, "neg.* has a key length outside of a region"),
    ],
)
def test_a_broken_guarantee_is_caught(spoil, match: str) -> None:  # type: ignore[no-untyped-def]
    assert_caught(FoldAttention, before(FoldAttention, "llama", 3), spoil, match)
