"""`hoist_prologue`: what no layer computes stands in front, once."""

from __future__ import annotations

import pytest
import torch

from adept_fx.graph import meta
from adept_fx.graph.base import Work
from adept_fx.graph.meta import PROLOGUE
from adept_fx.graph.runner import run_passes
from adept_fx.passes.hoist_prologue import HoistPrologue

from .check import (
    ROTARY,
    assert_caught,
    aten,
    before,
    border,
    calls,
    check_pass,
    each_model,
    insert,
)


@each_model
def test_counts(kind: str, layers: int) -> None:
    work = before(HoistPrologue, kind, layers)
    nodes = len(work.graph.graph.nodes)
    counts = check_pass(HoistPrologue, work)
    assert counts["merged"] == (2 * (layers - 1) if kind in ROTARY else 0)
    assert counts["merged"] == nodes - len(work.graph.graph.nodes)
    assert 0 < counts["moved"] < 20


@each_model
def test_the_prologue_comes_first(kind: str, layers: int) -> None:
    work = before(HoistPrologue, kind, layers)
    run_passes(work, [HoistPrologue()])
    nodes = calls(work)
    last = max(at for at, node in enumerate(nodes) if meta.get(node).layer == PROLOGUE)
    assert not [node for node in nodes[:last] if (meta.get(node).layer or 0) > 0]


def _prologue(work: Work) -> list[torch.fx.Node]:
    return [node for node in calls(work) if meta.get(node).layer == PROLOGUE]


def _late(work: Work) -> None:
    first = _prologue(work)[-1]
    insert(border(work, 2), aten.neg.default, first, like=first)


def _twice(work: Work) -> None:
    first = _prologue(work)[-1]
    insert(first, first.target, *first.args, like=first)


@pytest.mark.parametrize(("spoil", "match"), [(_late, "comes after a layer"), (_twice, "equal")])
def test_a_broken_guarantee_is_caught(spoil, match: str) -> None:  # type: ignore[no-untyped-def]
    assert_caught(HoistPrologue, before(HoistPrologue, "llama", 3), spoil, match)
