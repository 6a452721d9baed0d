"""Models that another library has changed: the rewritten one against the changed original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

import adept_fx
from adept_fx.gates import Replay
from dialogue import THRESHOLD, Case, Script, assert_trace_equal, play, play_oracle, script
from product import PLANS, play_product

EXITS = (1, 2)
LAYERS = 3
CASE = Case(lengths=(7, 3, 5), steps=3)


def transformed(model: PreTrainedModel) -> Any:
    """Exits and layers are few: a capture takes seconds."""
    config = adept_fx.ExitConfig(exits=EXITS, gate=Replay([]), threshold=THRESHOLD)
    return adept_fx.transform(model, config)


def check_never(model: PreTrainedModel, ee: Any, what: str) -> None:
    """At threshold 1.0 the dense plan is the changed original, bit for bit."""
    said = script(CASE, len(EXITS))
    said = replace(said, scores=[torch.ones_like(scores) for scores in said.scores])
    got = play_product(ee, said, "dense", threshold=1.0)
    want = replace(play(model, said), depths=[turn.real * LAYERS for turn in said.turns])
    assert_trace_equal(got, want, said, f"{what} never exits", bitwise=True)


def check_exits(
    model: PreTrainedModel,
    ee: Any,
    what: str,
    truth: PreTrainedModel | None = None,
    plans: Sequence[str] = PLANS,
) -> None:
    """With mixed exits, states and caches are those of the oracle on the changed original."""
    said: Script = script(CASE, len(EXITS))
    want = play_oracle(model, EXITS, said)
    exact = None if truth is None else play_oracle(truth, EXITS, said)
    for plan in plans:
        got = play_product(ee, said, plan)
        assert_trace_equal(got, want, said, f"{what} plan={plan}", truth=exact)
