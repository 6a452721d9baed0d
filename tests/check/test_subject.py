"""A check tells good rewriting from bad, and from models that are none of its business."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from adept_fx.check import subject
from adept_fx.check.result import STEPS
from adept_fx.check.subject import check
from adept_fx.config import ExitConfig
from adept_fx.errors import CaptureError
from adept_fx.graph.blocks import Synthesis, SynthesizedKV
from adept_fx.rewrite import transform
from adept_fx.runtime.tokens import Tokens
from models import tiny


@cache
def llama() -> Any:
    return tiny("llama", layers=3)


@cache
def rewritten(exits: tuple[int, ...]) -> Any:
    return transform(llama(), ExitConfig(exits=exits, gate="linear"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeded tiny llama in place of whatever is asked for, transformed once."""
    monkeypatch.setattr(subject, "build", lambda name: llama())
    monkeypatch.setattr(subject, "transform", lambda model, config: rewritten(config.exits))
    monkeypatch.setattr(subject.Examination, "_restore", lambda self: "")


def outcome(step: str) -> tuple[str, str]:
    result = check("anything")
    assert set(result.steps) == set(STEPS)
    assert result.reason == next((f"{k}: {v}" for k, v in result.steps.items() if v != "ok"), "")
    return result.status, result.steps[step]


def test_an_honest_rewriting_passes() -> None:
    result = check("anything")
    assert (result.status, result.reason) == ("passed", "")
    assert result.steps == dict.fromkeys(STEPS, "ok")
    assert result.facts["model_class"] == "LlamaForCausalLM"
    assert result.facts["decoder_class"] == "LlamaModel"
    assert result.facts["layers"] == 3


def _zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipped layers get keys and values of zeros."""
    whole = Synthesis.forward

    def broken(self: Synthesis, tokens: Any, *inputs: Any) -> SynthesizedKV | None:
        made = whole(self, tokens, *inputs)
        if made is None:
            return None
        zeros = {k: tuple(torch.zeros_like(v) for v in vs) for k, vs in made.values.items()}
        return SynthesizedKV(made.index, zeros)

    monkeypatch.setattr(Synthesis, "forward", broken)


def _thawed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the dense plan, layers go on changing what has left."""
    monkeypatch.setattr(Tokens, "freeze", lambda self, new, frozen: new)


def _misplaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed states come back in another order."""
    scatter = Tokens.scatter

    def broken(self: Tokens, whole: Tensor, state: Tensor) -> Tensor:
        return scatter(self, whole, state if self.index is None else state.flip(1))

    monkeypatch.setattr(Tokens, "scatter", broken)


def _nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token ever leaves."""
    monkeypatch.setattr(subject, "THRESHOLD", 1.0)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_zeros, "plan compact: logits of turn 0: off by"),
        (_thawed, "plan dense: logits of turn 0: off by"),
        (_misplaced, "plan compact: logits of turn 0: off by"),
        (_nobody, "nothing was checked"),
    ],
)
def test_a_broken_rewriting_fails(spoil: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch)
    status, found = outcome("exits")
    assert status == "failed"
    assert says in found


def test_a_crash_is_a_failure_and_a_refusal_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(model: Any, config: Any) -> Any:
        raise ZeroDivisionError("by nothing")

    def refuse(model: Any, config: Any) -> Any:
        raise CaptureError("it cannot be traced", hint="take another")

    monkeypatch.setattr(subject, "transform", crash)
    result = check("anything")
    assert (result.status, result.reason) == ("failed", "ZeroDivisionError: by nothing")
    monkeypatch.setattr(subject, "transform", refuse)
    result = check("anything")
    assert result.status == "refused"
    assert result.reason.startswith("it cannot be traced")


def test_an_original_that_does_not_work_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"no module for {name}")

    monkeypatch.setattr(subject, "build", missing)
    result = check("anything")
    assert (result.status, result.reason) == ("unavailable", "ImportError: no module for anything")
    broken = tiny("llama", layers=3)
    broken.lm_head.weight.data.fill_(torch.nan)
    monkeypatch.setattr(subject, "build", lambda name: broken)
    result = check("anything")
    assert (result.status, result.reason) == ("unavailable", "the original's logits are not finite")
