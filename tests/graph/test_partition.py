"""What each stage returns, and what later stages read of it."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch.fx import Node

from adept_fx.errors import UnsupportedModelError
from adept_fx.graph import meta
from adept_fx.graph.base import Work
from adept_fx.graph.blocks import Stage
from adept_fx.graph.meta import PROLOGUE
from adept_fx.graph.partition import Partition
from adept_fx.graph.runner import run_passes
from adept_fx.graph.writes import slot, writes
from adept_fx.ops import tokens as ops
from adept_fx.passes.compact_tokens import CompactTokens
from adept_fx.passes.find_layers import FindLayers
from adept_fx.pipeline import PIPELINE
from toys import NOTE, Noting, NotingToTheEnd, Prepared, RowNoting, Toy, work_of


def note_of(work: Work) -> Node:
    return next(
        n
        for n in work.graph.graph.nodes
        if n.op == "call_function" and meta.get(n).layer == 0 and _width(n) == NOTE
    )


def _width(node: Node) -> int | None:
    value = node.meta.get("val")
    size = value.shape[-1] if isinstance(value, torch.Tensor) and value.ndim else None
    return size if isinstance(size, int) else None  # to compare a symbol would fix it


@pytest.mark.parametrize("exits", [(1,), (2,), (1, 2)])
def test_a_note_is_returned_by_its_stage_alone_and_read_by_all_behind(
    exits: tuple[int, ...],
) -> None:
    work = work_of(Noting, CompactTokens, exits)
    plan, note = Partition(work), note_of(work)
    first, *others, last = plan.parts
    assert first.outputs == [plan.borders[exits[0]], note]
    assert first.gated == 1
    for part in others:
        assert note in part.live
        assert note not in part.outputs
    assert note not in last.live


def test_notes_come_behind_what_the_gate_asked_for() -> None:
    work = work_of(Noting, CompactTokens, (1, 2), ("previous", "key"))
    plan, note = Partition(work), note_of(work)
    (write, *_) = writes(work.graph.graph.nodes)
    assert plan.parts[0].outputs == [plan.borders[1], plan.borders[0], write.args[0], note]
    assert plan.parts[0].gated == 3
    assert len(plan.parts[1].outputs) == plan.parts[1].gated == 3


def test_notes_are_gathered_at_every_exit_and_are_no_features_of_a_gate() -> None:
    work = work_of(Noting, None, (1, 2), ("previous",))
    gathered = [node.name for node in work.find(ops.gather_tokens)]
    note = next(name for name in gathered if name.startswith("linear") and name.endswith("_1"))
    assert note.removesuffix("1") + "2" in gathered
    assert [len(node.args) for node in work.find(ops.decide)] == [4, 4]
    stages = [m for m in work.graph.modules() if isinstance(m, Stage)]
    assert [stage.outputs for stage in stages] == [3, 2, 1]


def test_what_is_made_before_the_layers_is_returned_by_no_stage() -> None:
    work = work_of(Prepared, CompactTokens)
    plan = Partition(work)
    assert [len(part.outputs) for part in plan.parts] == [1, 1, 1, 1]
    for part in plan.parts[:-1]:
        made = [n for n in part.live if _width(n) == NOTE and meta.get(n).layer == PROLOGUE]
        assert len(made) == 1


def test_a_note_per_row_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"of layer 0.* has no entry per token"):
        work_of(RowNoting, None)


def test_a_note_behind_the_last_layer_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"what follows the last layer reads .*layer 0"):
        work_of(NotingToTheEnd, None)


def _sharing(reader: int, source: int) -> Work:
    """One layer attends to the keys of an earlier one, and has none of its own; an exit after 1."""
    work = work_of(Toy, FindLayers, (1,))
    attend = work.find(torch.ops.adept_fx.attention.default)
    own = [item for item in attend[reader].args[1:3] if isinstance(item, Node)]
    attend[reader].args = (
        attend[reader].args[0],
        *attend[source].args[1:3],
        *attend[reader].args[3:],
    )
    for unread in (*own, own[0].all_input_nodes[0]):
        work.graph.graph.erase_node(unread)
    work.graph.graph.eliminate_dead_code()
    at = PIPELINE.index(FindLayers)
    run_passes(work, [step() for step in PIPELINE[at : PIPELINE.index(CompactTokens)]])
    return work


def test_keys_of_an_earlier_layer_are_read_by_a_region_of_the_later_one() -> None:
    work = _sharing(reader=2, source=0)
    first, second = writes(work.graph.graph.nodes)
    regions = work.graph.graph.find_nodes(op="call_module")
    regions = [node for node in regions if str(node.target).startswith("attention")]
    assert [meta.get(node).layer for node in regions] == [0, 1, 2]
    sources = [node.args[0].args[0] for node in regions]  # type: ignore[union-attr]
    assert sources == [first, second, first]
    assert all(node.args[0].target is operator.getitem for node in regions)  # type: ignore[union-attr]


def test_shared_keys_are_kept_if_an_exit_lies_between() -> None:
    work = _sharing(reader=2, source=0)
    assert Partition(work).shared == {slot(writes(work.graph.graph.nodes)[0])} == {"kv_0"}
    run_passes(work, [CompactTokens()])
    graphs: list[Any] = [work.graph.get_submodule(f"stage_{at}.graph").graph for at in (0, 1)]
    early, late = graphs
    (kept,) = early.find_nodes(op="call_function", target=ops.write_cache)
    assert kept.args[3] == "kv_0"
    assert kept.args[-1] is True
    read = late.find_nodes(op="call_function", target=ops.read_cache)
    assert [node.args[1:] for node in read] == [("kv_0", 0), ("kv_0", 1)]
    (other,) = late.find_nodes(op="call_function", target=ops.write_cache)
    assert other.args[3] == "kv_1"
    assert len(other.args) == 5, "nobody reads it later"


def test_shared_keys_within_a_stage_are_not_kept() -> None:
    assert Partition(_sharing(reader=2, source=1)).shared == set()
