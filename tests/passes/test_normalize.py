"""`normalize`: only what computes values is left."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from adept_fx.graph.base import Work
from adept_fx.graph.runner import run_passes
from adept_fx.passes.normalize import Normalize

from .check import (
    MODELS,
    TYPES,
    assert_caught,
    aten,
    before,
    calls,
    check_pass,
    each_model,
    insert,
    named,
    put_behind,
)


@cache
def _counts(kind: str, layers: int) -> dict[str, int]:
    return check_pass(Normalize, before(Normalize, kind, layers))


@each_model
def test_counts(kind: str, layers: int) -> None:
    work = before(Normalize, kind, layers)
    ops = [node.target for node in work.graph.graph.nodes]
    counts = _counts(kind, layers)
    assert counts["inputs"] == 1 + len(work.masks)
    assert counts["views"] == ops.count(aten.view.default) + ops.count(aten._unsafe_view.default)
    assert counts["dropouts"] == ops.count(aten.dropout.default)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if (kind, 5) in MODELS])
def test_counts_grow_with_the_layers(kind: str) -> None:
    deep, shallow = _counts(kind, 5), _counts(kind, 3)
    fixed = ("inputs", "sizes", "dead")
    assert all(deep[name] == shallow[name] for name in fixed)
    per_layer = {name: (deep[name] - shallow[name]) / 2 for name in deep if name not in fixed}
    assert all(grown >= 0 and grown == int(grown) for grown in per_layer.values())
    assert all(shallow[name] >= 3 * grown for name, grown in per_layer.items())
    assert per_layer["views"] >= 1


@each_model
def test_the_inputs_are_explicit(kind: str, layers: int) -> None:
    work = before(Normalize, kind, layers)
    run_passes(work, [Normalize()])
    names = [node.name for node in work.graph.graph.find_nodes(op="placeholder")]
    assert names.count("inputs_embeds") == 1
    assert "input_ids" not in names
    masks = [f"mask_{index}_{mask.key}" for index, mask in enumerate(work.masks)]
    assert [name for name in names if name.startswith("mask_")] == masks


@each_model
def test_nothing_but_values_is_left(kind: str, layers: int) -> None:
    work = before(Normalize, kind, layers)
    run_passes(work, [Normalize()])
    for node in calls(work):
        name = str(node.target)
        assert not any(word in name for word in ("assert", "dropout", "aten.view", "constrain"))
        assert node.users, f"{node.name} is dead"
        schema = getattr(node.target, "_schema", None)
        assert not getattr(schema, "is_mutable", False), f"{node.name} writes in place"


def test_other_uses_of_input_ids_make_it_an_input_beside_the_embedding() -> None:
    work = before(Normalize, "llama", 3)
    site = next(node for node in work.graph.graph.nodes if node.target is aten.silu.default)
    number = insert(site, aten.unsqueeze.default, named(work, "input_ids"), -1, like=site)
    scaled = insert(number, aten.mul.Tensor, site, number, like=site)
    site.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    run_passes(work, [Normalize()])
    assert list(named(work, "input_ids").users) == [number]
    assert named(work, "inputs_embeds").op == "placeholder"
    assert not work.find(aten.embedding.default)


def _embeds(work: Work) -> torch.fx.Node:
    return named(work, "inputs_embeds")


def test_slices_of_everything_are_dropped_and_others_stay() -> None:
    work = before(Normalize, "llama", 3)
    state = work.graph.graph.output_node().all_input_nodes[0]
    whole = put_behind(state, aten.slice.Tensor, 1, 0, torch.iinfo(torch.int64).max)
    sized = put_behind(whole, aten.slice.Tensor, 2, 0, state.meta["val"].shape[2])
    half = put_behind(sized, aten.slice.Tensor, 2, 0, 16)
    put_behind(half, aten.repeat.default, [1, 1, 2])
    rotary = sum(n.target is aten.slice.Tensor for n in work.graph.graph.nodes) - 3
    counts = check_pass(Normalize, work)
    assert counts["slices"] == 2
    left = work.find(aten.slice.Tensor)
    assert len(left) == rotary + 1
    assert half in left
    assert half.args[0] is state


def _noop_slice(work: Work) -> None:
    put_behind(_embeds(work), aten.slice.Tensor, 1)


def _noop_cast(work: Work) -> None:
    put_behind(_embeds(work), aten.to.dtype, torch.float32)


def _assertion(work: Work) -> None:
    node = _embeds(work)
    with work.graph.graph.inserting_after(node):
        target = aten._assert_tensor_metadata.default
        work.graph.graph.call_function(target, (node,)).meta["val"] = None


def _in_place(work: Work) -> None:
    first = next(node for node in work.graph.graph.nodes if node.target is aten.mul.Tensor)
    put_behind(first, aten.mul_.Tensor, first)


def _unused_input(work: Work) -> None:
    node = _embeds(work)
    with work.graph.graph.inserting_after(node):
        work.graph.graph.placeholder("unused").meta["val"] = node.meta["val"]


def _dead_node(work: Work) -> None:
    insert(_embeds(work), aten.neg.default, _embeds(work))


def _renamed_input(work: Work) -> None:
    _embeds(work).name = "embeds"


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_noop_cast, "normalize left .*aten.to.dtype"),
        (_noop_slice, "normalize left .*aten.slice"),
        (_assertion, "normalize left .*assert"),
        (_in_place, "writes in place: .*mul_"),
        (_unused_input, "unused input unused"),
        (_renamed_input, "inputs_embeds"),
        (_dead_node, "neg"),
    ],
)
def test_a_broken_guarantee_is_caught(spoil, match: str) -> None:  # type: ignore[no-untyped-def]
    assert_caught(Normalize, before(Normalize, "llama", 3), spoil, match)
