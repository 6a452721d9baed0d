"""`insert_gates`: a gate per exit point, a freeze per border behind the first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Node

from adept_fx.errors import PassError, UnsupportedModelError
from adept_fx.graph import meta
from adept_fx.graph.base import Work
from adept_fx.graph.runner import run_passes
from adept_fx.passes.insert_gates import InsertGates

from .check import assert_caught, before, border, check_pass, each_case, write

GATE = torch.ops.adept_fx.gate.default
FREEZE = torch.ops.adept_fx.freeze.default


@each_case
def test_counts(kind: str, layers: int, exits: tuple[int, ...]) -> None:
    work = before(InsertGates, kind, layers, exits)
    counts = check_pass(InsertGates, work, metadata=len(exits) == 2)
    assert counts == {"gates": len(exits), "freezes": layers - exits[0]}


@pytest.mark.parametrize("exits", [(2,), (1, 3)])
def test_what_layers_read_behind_an_exit_is_frozen(exits: tuple[int, ...]) -> None:
    work = before(InsertGates, "llama", 5, exits)
    run_passes(work, [InsertGates()])
    gates = work.find(GATE)
    active = {
        layer: [g for g, e in zip(gates, exits, strict=True) if e < layer] for layer in range(6)
    }
    for layer in range(exits[0] + 1, 6):
        state = border(work, layer)
        assert state.target is FREEZE
        new, frozen, mask = state.args
        assert frozen is border(work, layer - 1)
        assert mask is active[layer][-1]
        assert isinstance(new, Node)
        assert list(new.users) == [state]
    assert [gate.args[2] for gate in gates] == [None, *gates[:-1]]


def test_features_come_in_a_fixed_order() -> None:
    work = before(InsertGates, "llama", 3)
    work.needs = (frozenset({"value", "query", "previous", "key"}),)
    run_passes(work, [InsertGates()])
    (gate,) = work.find(GATE)
    features: Any = gate.args[1]
    previous, asked, key, value = features
    assert previous is border(work, 0)
    assert meta.get(asked).layer == 0
    assert asked.meta["val"].shape[1] == 4  # heads; keys and values have two
    assert (key, value) == write(work, 0).args[:2]


@pytest.mark.parametrize("exits", [(0,), (3,), (1, 4)])
def test_exits_outside_the_layers_are_refused(exits: tuple[int, ...]) -> None:
    work = before(InsertGates, "llama", 3)
    work.exits = exits
    bad = [e for e in exits if not 1 <= e < 3]
    with pytest.raises(PassError, match=rf"exit points \{bad}.* outside 1..2"):
        run_passes(work, [InsertGates()])


def test_a_query_that_no_attention_function_gets_is_refused() -> None:
    work = before(InsertGates, "bloom", 3, (2,))
    work.needs = (frozenset({"query"}),)
    with pytest.raises(UnsupportedModelError, match="exit 2 needs the query of layer 1"):
        run_passes(work, [InsertGates()])


def _drop_a_freeze(work: Work) -> None:
    node = work.find(FREEZE)[-1]
    meta.update(node.args[0], border=meta.get(node).border)  # type: ignore[arg-type]
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    work.graph.graph.erase_node(node)


def _swap_states(work: Work) -> None:
    """The last freeze gives back the state of two layers before."""
    last, before_last = work.find(FREEZE)[-1], work.find(FREEZE)[-2]
    last.update_arg(1, before_last.args[1])


def _gate_elsewhere(work: Work) -> None:
    work.find(GATE)[0].update_arg(0, border(work, 0))


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_drop_a_freeze, "'freezes': 1"),
        (_gate_elsewhere, "does not see the state after 1 layers"),
        (_swap_states, "freeze"),
    ],
)
def test_a_broken_guarantee_is_caught(spoil, match: str) -> None:  # type: ignore[no-untyped-def]
    assert_caught(InsertGates, before(InsertGates, "llama", 3), spoil, match)
