"""The gate on positions: its numbers, and what position the runtime says a token has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import adept_fx
from adept_fx import ExitConfig
from adept_fx.errors import ConfigError
from adept_fx.gates import Gate, GateInputs, Schedule
from product import EXITS, raw, rewritten


def depths(gate: Schedule, positions: list[int], num_exits: int) -> list[int]:
    """Index of the first exit at which each position leaves; `num_exits` if none."""
    at = torch.tensor(positions)
    scores = []
    for index in range(num_exits):
        shape = (1, len(positions))
        place = torch.zeros_like(at)
        tokens = GateInputs(
            torch.zeros(len(at), 4), place, at, index, "decode", num_exits, shape, position=at
        )
        scores.append(gate(tokens))
    leaves = torch.stack([*scores, torch.ones(len(at))])
    assert set(leaves.flatten().tolist()) <= {0.0, 1.0}
    return leaves.argmax(0).tolist()


@pytest.mark.parametrize(
    ("gate", "num_exits", "expected"),
    [
        (Schedule(end=8), 4, [4, 4, 3, 3, 2, 2, 1, 1, 0, 0]),
        (Schedule(2, 1, start=2, end=6), 4, [2, 2, 2, 2, 2, 2, 1, 1, 1, 1]),
        (Schedule(3, start=7, end=8), 4, [3, 3, 3, 3, 3, 3, 3, 3, 0, 0]),
        (Schedule(1, 1, end=1), 2, [1] * 10),
        (Schedule(9, 9, end=1), 2, [2] * 10),  # past the last exit: nothing leaves
        (Schedule(None, 9, end=1), 2, [2] * 10),
    ],
)
def test_depth_falls_in_a_line(gate: Schedule, num_exits: int, expected: list[int]) -> None:
    found = depths(gate, list(range(10)), num_exits)
    assert found == expected
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(
    "options",
    [
        {"deepest": -1},
        {"deepest": 1, "shallowest": 2},
        {"shallowest": 1.0},
        {"start": True},
        {"start": 5, "end": 5},
    ],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=list(options)[-1]):
        Schedule(**options)


def test_json_and_no_parameters() -> None:
    config = ExitConfig(exits=(1, 2), gate=Schedule(1, start=3, end=9))
    gate = ExitConfig.from_json(config.to_json()).gate
    assert isinstance(gate, Schedule)
    assert (gate.deepest, gate.shallowest, gate.start, gate.end) == (1, 0, 3, 9)
    assert not gate.state_dict()


class Places(Gate):
    """Notes the positions that it is told; nothing leaves."""

    needs = frozenset({"position"})
    per_token = True  # and yet it cannot be part of a compiled stage

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, tokens: GateInputs) -> Tensor:
        if tokens.exit_index == 0:
            self.seen.append(tokens.need("position"))
        return torch.zeros(len(tokens.hidden))


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "given"), [("llama", True), ("llama", False), ("bloom", False)]
)
def test_a_position_counts_cached_tokens_and_no_padding(model_type: str, given: bool) -> None:
    ee, gate = rewritten(model_type), Places()
    ee.adept.set_gates(gate)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    ids, cache = torch.arange(1, 13).view(2, 6), DynamicCache(config=ee.config)
    for part in (slice(0, 4), slice(4, 5), slice(5, 6)):
        seen = mask[:, : part.stop]
        places = {"position_ids": (seen.cumsum(-1) - 1).clamp(min=0)[:, part]} if given else {}
        ee(ids[:, part], attention_mask=seen, past_key_values=cache, **places)
    found = [item.tolist() for item in gate.seen]
    assert found == [[0, 1, 2, 3, 0, 1], [4, 2], [5, 3]]
    gate.seen.clear()
    cache = DynamicCache(config=ee.config)
    ee(ids[:, :3], past_key_values=cache)
    ee(ids[:, 3:4], past_key_values=cache)
    assert [item.tolist() for item in gate.seen] == [[0, 1, 2] * 2, [3, 3]]


@torch.no_grad()
def test_generation_gets_shallower() -> None:
    config = ExitConfig(exits=EXITS, gate=Schedule(end=8), threshold=0.5, prefill_threshold=1.0)
    ee = adept_fx.transform(raw("llama"), config)
    seen: list[list[int]] = []
    ee.register_forward_hook(lambda *_: seen.append(ee.adept.last_depth[:, -1].tolist()))
    mask = torch.ones(2, 3, dtype=torch.long)
    mask[1, :2] = 0
    ids = torch.arange(1, 7).view(2, 3)
    # Exit indices 2, 1, 0 are 4, 3 and 1 layers; a row's positions start behind its padding.
    wanted = [4 if p < 4 else 3 if p < 8 else 1 for p in range(12)]
    for cache in ("dynamic", "static"):
        seen.clear()
        options = {"max_new_tokens": 9, "do_sample": False, "cache_implementation": cache}
        ee.generate(ids, attention_mask=mask, **options)
        assert seen[0] == [4, 4]
        assert [list(row) for row in zip(*seen[1:], strict=True)] == [wanted[3:11], wanted[1:9]]
