"""Exits that a gate chose itself: equal to the oracle's, and the same when compiled."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import adept_fx
from adept_fx import ExitConfig
from adept_fx.gates import AttentionMLP, DraftTokens, Gate, GateInputs, Schedule
from dialogue import Case, Script, Trace, assert_trace_equal, play, play_oracle, script
from product import raw, rewritten

CASE = Case((6, 3, 5), chunk=4, steps=3, seed=5)


class Recorder:
    """Writes down, per forward, who was let go: as scores for the oracle."""

    def __init__(self, gates: list[Gate], thresholds: tuple[float, ...] = (1.0,) * 9) -> None:
        self.thresholds = thresholds
        self.seen: dict[int, list[Tensor]] = {}
        self.scores: list[Tensor] = []
        self.handles = [gate.register_forward_hook(self._note) for gate in dict.fromkeys(gates)]

    def _note(self, gate: Gate, args: tuple[GateInputs, ...], out: Tensor) -> None:
        tokens = args[0]
        if tokens.exit_index == 0:
            self.scores.append(torch.zeros(tokens.num_exits, *tokens.batch_shape))
        self.seen.setdefault(tokens.exit_index, []).append(out)
        place = (tokens.exit_index, tokens.batch_index, tokens.token_index)
        self.scores[-1][place] = (out > self.thresholds[tokens.exit_index]).float()

    def stop(self) -> list[Tensor]:
        for handle in self.handles:
            handle.remove()
        return self.scores


def _play(ee: Any, spoken: Script) -> Trace:
    return play(ee, spoken, depth=lambda _: ee.adept.last_depth)


def _set_thresholds(ee: Any, gates: list[Gate], spoken: Script) -> None:
    """So that about half of the tokens leave at each exit, and no score is near the threshold."""
    ee.adept.thresholds = 1.0
    recorder = Recorder(gates)
    _play(ee, spoken)
    recorder.stop()
    found = []
    for scores in recorder.seen.values():
        ordered = torch.cat(scores).sort().values
        middle = slice(len(ordered) // 3, 2 * len(ordered) // 3 + 1)
        gaps = ordered[middle].diff()
        at = middle.start + int(gaps.argmax())
        found.append(float((ordered[at] + ordered[at + 1]) / 2))
    ee.adept.thresholds = [*found, *[1.0] * (len(ee.adept.thresholds) - len(found))]


@torch.no_grad()
def _shake(gates: list[Gate]) -> None:
    """Numbers that make learned gates look at their input."""
    make = torch.Generator().manual_seed(3)
    for gate in dict.fromkeys(gates):
        for name, parameter in gate.named_parameters():
            scale = 0.0 if name == "bias" else parameter.shape[-1] ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=make))


@cache
def _learned(model_type: str) -> tuple[Any, list[Gate]]:
    """A model with all learned gates, that tell the tokens of `CASE` apart."""
    gates: list[Gate] = [DraftTokens(16), AttentionMLP(32, width=16), DraftTokens(16)]
    ee = adept_fx.transform(raw(model_type), ExitConfig((1, 2, 3), tuple(gates)))
    _shake(gates)
    _set_thresholds(ee, gates, script(CASE, 3))
    return ee, gates


def _scheduled(model_type: str) -> tuple[Any, list[Gate]]:
    ee, gates = rewritten(model_type), [Schedule(2, 0, end=5)] * 2
    ee.adept.set_gates(gates)
    ee.adept.thresholds = 0.5
    return ee, list(gates)


@pytest.mark.parametrize("make", [_learned, _scheduled], ids=["learned", "schedule"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_eager_exits_equal_the_oracles(model_type: str, make: Any) -> None:
    """Left padding, a prompt in chunks, then decode."""
    ee, gates = make(model_type)
    exits = ee.adept.config.exit_layers
    spoken = script(CASE, len(exits))
    depths = []
    for plan in ("dense", "compact"):
        ee.adept.plan = plan
        recorder = Recorder(gates, ee.adept.thresholds)
        got = _play(ee, spoken)
        said = Script(CASE, spoken.turns, recorder.stop())
        want = play_oracle(raw(model_type), exits, said)
        assert_trace_equal(got, want, said, f"{model_type} {plan}")
        depths.append(torch.cat(got.depths, 1))
        for part in (got.depths[0], torch.cat(got.depths[-3:], 1)):
            assert len(set(part.flatten().tolist()) - {0}) > 1, "all of one mind"
    assert torch.equal(*depths)
    assert len(set(depths[0].flatten().tolist()) - {0}) == len(exits) + 1


@pytest.mark.slow
def test_compiled_exits_equal_eager_ones() -> None:
    """`AttentionMLP` inside the stage before it, the others between the stages."""
    spoken = script(replace(CASE, lengths=(6, 4), chunk=0, steps=1), 3)
    gates: list[Gate] = [DraftTokens(16), AttentionMLP(32, width=16), Schedule(3, 2, end=4)]
    ee = adept_fx.transform(raw("llama"), ExitConfig((1, 2, 3), tuple(gates)))
    ee.adept.plan = "compact"
    _shake(gates)
    _set_thresholds(ee, gates[:2], spoken)
    ee.adept.thresholds = [*ee.adept.thresholds[:2], 0.5]  # a schedule knows 0 and 1 alone
    want = _play(ee, spoken)
    assert set(torch.cat(want.depths, 1).flatten().tolist()) == {0, 1, 2, 3, 4}
    ee.adept.compile(backend="eager")
    assert_trace_equal(_play(ee, spoken), want, spoken, "compiled")
    ee.adept.uncompile()
