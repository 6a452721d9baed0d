"""The measured profitability rule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import adept_fx
from adept_fx.gates import Replay
from adept_fx.runtime.costs import Costs, measure
from models import tiny

# Time is that of reading weights up to 16 tokens, and grows with them from there on.
LIKE_A_CPU = Costs((2, 16, 64), layer=(1.0, 1.0, 4.0), moved=(0.05, 0.05, 0.2), owed=0.1)


def test_times_lie_on_lines() -> None:
    at = [LIKE_A_CPU._at(LIKE_A_CPU.layer, tokens) for tokens in (1, 2, 9, 16, 40, 64, 128)]
    assert at == pytest.approx([1.0, 1.0, 1.0, 1.0, 2.5, 4.0, 8.0])


def test_what_reads_all_weights_stays_dense() -> None:
    assert not any(LIKE_A_CPU.profitable(live, 8 - live, 8) for live in range(1, 8))


def test_few_of_many_are_packed_and_nearly_all_are_not() -> None:
    assert LIKE_A_CPU.profitable(64, 64, 128)
    assert not LIKE_A_CPU.profitable(126, 2, 128)
    answers = [LIKE_A_CPU.profitable(live, 128 - live, 128) for live in range(1, 129)]
    assert answers == sorted(answers, reverse=True)


def test_owed_keys_count() -> None:
    """Padding owes nothing."""
    dear = Costs((2, 64), layer=(1.0, 32.0), moved=(0.0, 0.0), owed=1.0)
    assert not dear.profitable(32, 32, 64)
    assert dear.profitable(32, 0, 64)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_layers_are_measured(name: str) -> None:
    ee: Any = adept_fx.transform(tiny(name), adept_fx.ExitConfig(exits=(1,)))
    found = measure(ee.adept._forward.prepare())
    assert found is not None
    assert len(found.tokens) == len(found.layer) == len(found.moved)
    assert min(found.layer) > 0
    assert min(found.moved) > 0
    assert 0 < found.owed < 0.6


@torch.no_grad()
def test_a_compiled_model_goes_by_them() -> None:
    ee: Any = adept_fx.transform(
        tiny("llama"), adept_fx.ExitConfig(exits=(1,), gate=Replay([]), threshold=0.5)
    )
    forward = ee.adept._forward
    assert forward.costs is None
    ee.adept.compile(backend="eager")
    assert isinstance(forward.costs, Costs)
    assert copy.deepcopy(ee).adept._forward.costs is None
    scores = torch.zeros(1, 1, 16)
    scores[:, :, :8] = 1.0
    executed = {}
    for moved in (0.0, 100.0):
        forward.costs = Costs((2, 16), layer=(1.0, 8.0), moved=(moved, moved), owed=0.1)
        ee.adept.set_gates(Replay([scores]))
        ee.adept.stats.reset()
        ee(torch.arange(16)[None])
        executed[moved] = ee.adept.stats.executed_token_layers
    layers = ee.config.num_hidden_layers
    assert executed == {0.0: 16 + 8 * (layers - 1), 100.0: 16 * layers}
    ee.adept.uncompile()
    assert forward.costs is None
