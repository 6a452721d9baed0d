"""`synthesize_kv`: each exit point has the keys and values of all layers behind it."""

from __future__ import annotations

import operator
from typing import Any

import pytest
from torch import fx
from torch.fx import Node

from adept_fx.errors import UnsupportedModelError
from adept_fx.graph.base import Work
from adept_fx.graph.runner import run_passes
from adept_fx.ops.project import project_layers
from adept_fx.passes.synthesize_kv import SynthesizeKV

from .check import assert_caught, assert_same, aten, before, check_pass, each_case, insert, write

FUSED = ("gpt_neox", "bloom")


@each_case
def test_counts(kind: str, layers: int, exits: tuple[int, ...]) -> None:
    work = before(SynthesizeKV, kind, layers, exits)
    counts = check_pass(SynthesizeKV, work, metadata=len(exits) == 2)
    slices = sum(layers - e for e in exits)
    assert counts == {"slices": slices, "cut": slices if kind in FUSED else 0}


def test_transposed_projections_are_cut() -> None:
    counts = check_pass(SynthesizeKV, before(SynthesizeKV, "gpt2", 3))
    assert counts == {"slices": 2, "cut": 2}


@each_case
def test_writes_list_every_exit_before_them(kind: str, layers: int, exits: tuple[int, ...]) -> None:
    work = before(SynthesizeKV, kind, layers, exits)
    run_passes(work, [SynthesizeKV()])
    for layer in range(layers):
        node = write(work, layer)
        given = iter(node.args[4])  # type: ignore[arg-type]
        for index, exit_layer in enumerate(exits):
            for at in (0, 1) if exit_layer <= layer else ():
                item = next(given)
                assert item.target is operator.getitem
                call, position = item.args
                assert call.target == f"kv_{index}"
                assert position == 2 * (layer - exit_layer) + at
                assert_same(item.meta["val"], node.args[at].meta["val"], item.name)  # type: ignore
        assert next(given, None) is None


def test_layers_share_the_norm_statistic() -> None:
    work = before(SynthesizeKV, "llama", 5, (1,))
    run_passes(work, [SynthesizeKV()])
    module = work.graph.get_submodule("kv_0")
    assert isinstance(module, fx.GraphModule)
    targets = [node.target for node in module.graph.nodes]
    assert targets.count(aten.mean.dim) == 1
    assert targets.count(aten.linear.default) == 0
    assert targets.count(project_layers) == 2  # all keys, all values
    assert not any(True for _ in work.graph.parameters())


def _leak(work: Work) -> Node:
    """The keys of layer 2 see those of layer 1."""
    late, early = write(work, 2), write(work, 1)
    key = late.args[0]
    assert isinstance(key, Node)
    mixed = insert(key, aten.add.Tensor, key, early.args[0], like=key)
    late.update_arg(0, mixed)
    return mixed


def test_keys_that_follow_from_another_layer_are_refused() -> None:
    work = before(SynthesizeKV, "llama", 3)
    _leak(work)
    with pytest.raises(UnsupportedModelError, match="keys of layer 2 depend on"):
        run_passes(work, [SynthesizeKV()])


def _forget_one(work: Work) -> None:
    node = write(work, 2)
    node.update_arg(4, list(node.args[4])[:-1])  # type: ignore[arg-type]


def _first_exit_twice(work: Work) -> None:
    node = write(work, 2)
    first = list(node.args[4])[:2]  # type: ignore[arg-type]
    node.update_arg(4, first * 2)


def _key_and_value_swapped(work: Work) -> None:
    node = write(work, 2)
    listed: Any = node.args[4]
    key, value, *others = listed
    node.update_arg(4, [value, key, *others])


def _no_block(work: Work) -> None:
    work.graph.kv_9 = work.graph.kv_0
    (call,) = (node for node in work.graph.graph.nodes if node.target == "kv_0")
    call.target = "kv_9"
    del work.graph.kv_0


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_forget_one, "kv_2 lacks synthesized values"),
        (_no_block, "kv_1 lacks synthesized values"),
        (_first_exit_twice, "kv_2 lacks"),
        (_key_and_value_swapped, "kv_2 lacks"),
    ],
)
def test_a_broken_guarantee_is_caught(spoil, match: str) -> None:  # type: ignore[no-untyped-def]
    assert_caught(SynthesizeKV, before(SynthesizeKV, "llama", 3, (1, 2)), spoil, match)
