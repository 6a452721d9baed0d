"""The product as the equivalence tests drive it: one transform per model, gates swapped in."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import adept_fx
from adept_fx.gates import GateInputs, Replay
from dialogue import THRESHOLD, Script, Trace, assert_trace_equal, play, play_oracle
from models import MOE_TYPES, STATIC_TYPES, tiny
from oracle import cut, exact

EXITS = (1, 3)
LAYERS = 4
PLANS = ("auto", "dense", "compact")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Counted(Replay):
    """A Replay that counts the forwards in which it was asked."""

    def __init__(self, scores: list[Tensor]) -> None:
        super().__init__(scores)
        self.forwards = 0

    def forward(self, tokens: GateInputs) -> Tensor:
        self.forwards += tokens.exit_index == 0
        return super().forward(tokens)


# `cache` tells f("a") from f("a", "fp32"), so what it wraps has no defaults.
_tiny = cache(tiny)


def raw(model_type: str, dtype: str = "fp32") -> PreTrainedModel:
    """The original, which the rewritten model shares its parameters with."""
    return _tiny(model_type, DTYPES[dtype])


@cache
def truth(model_type: str) -> PreTrainedModel:
    """The bf16 model's weights in fp32."""
    return exact(raw(model_type, "bf16"))


@cache
def short(model_type: str, layers: int) -> PreTrainedModel:
    return cut(raw(model_type), layers)


def rewritten(model_type: str, dtype: str = "fp32", exits: tuple[int, ...] = EXITS) -> Any:
    """A transform takes seconds: tests share it, and set plan, gates and thresholds each time."""
    return _rewritten(model_type, dtype, exits)


@cache
def _rewritten(model_type: str, dtype: str, exits: tuple[int, ...]) -> Any:
    config = adept_fx.ExitConfig(exits=exits, gate=Replay([]), threshold=THRESHOLD)
    return adept_fx.transform(raw(model_type, dtype), config)


def cache_kinds(model_type: str) -> tuple[str, ...]:
    return ("dynamic", "static") if model_type in STATIC_TYPES else ("dynamic",)


def set_up(ee: Any, scores: list[Tensor], plan: str, threshold: float = THRESHOLD) -> Counted:
    """Sets everything that a test may have changed on a shared model."""
    gate = Counted(scores)
    ee.adept.set_gates(gate)
    ee.adept.plan = plan
    ee.adept.thresholds = [threshold] * len(scores[0])
    return gate


def play_product(ee: Any, spoken: Script, plan: str, threshold: float = THRESHOLD) -> Trace:
    """The rewritten model's trace; its gates must have been asked once per forward."""
    gate = set_up(ee, spoken.scores, plan, threshold)
    trace = play(ee, spoken, depth=lambda _: ee.adept.last_depth)
    assert gate.forwards == len(spoken.turns), f"plan={plan}: {gate.forwards} gated forwards"
    for depth, turn in zip(trace.depths, spoken.turns, strict=True):
        assert depth.shape == turn.ids.shape
        assert depth.dtype == torch.long
    return trace


def label(model_type: str, dtype: str, plan: str, spoken: Script) -> str:
    return f"{model_type} {dtype} plan={plan} {spoken.case}:"


def check_exits(
    model_type: str, spoken: Script, dtype: str = "fp32", exits: tuple[int, ...] = EXITS
) -> None:
    """(b): every plan says what the oracle says, of states, caches and depths."""
    want = play_oracle(raw(model_type, dtype), exits, spoken)
    real = None if dtype == "fp32" else play_oracle(truth(model_type), exits, spoken)
    for plan in PLANS:
        got = play_product(rewritten(model_type, dtype, exits), spoken, plan)
        what = label(model_type, dtype, plan, spoken)
        assert_trace_equal(got, want, spoken, what, truth=real)


def check_never(model_type: str, spoken: Script, dtype: str = "fp32") -> None:
    """(a): with threshold 1.0, dense is the original bit for bit, auto within rounding.

    Mixtures of experts have no rounding to speak of in bf16: there only dense is compared.
    """
    scores = [torch.where(s > 0.8, 1.0, s) for s in spoken.scores]  # 1.0 is not above 1.0
    spoken = Script(spoken.case, spoken.turns, scores)
    ee, want = rewritten(model_type, dtype), play(raw(model_type, dtype), spoken)
    want.depths = [turn.real * LAYERS for turn in spoken.turns]
    dense = play_product(ee, spoken, "dense", threshold=1.0)
    what = label(model_type, dtype, "dense", spoken)
    assert_trace_equal(dense, want, spoken, what, bitwise=True)
    auto = play_product(ee, spoken, "auto", threshold=1.0)
    what = label(model_type, dtype, "auto", spoken)
    if dtype == "fp32":
        assert_trace_equal(auto, want, spoken, what)
    elif model_type not in MOE_TYPES:
        real = play(truth(model_type), spoken)
        assert_trace_equal(auto, want, spoken, what, truth=real)


def check_all_out(
    model_type: str, spoken: Script, index: int, exits: tuple[int, ...] = EXITS
) -> None:
    """(d) and (e): all out at one exit is the model cut there; compact skips, dense masks."""
    count = exits[index]
    want = play(short(model_type, count), spoken)
    want.depths = [turn.real * count for turn in spoken.turns]
    for plan in PLANS:
        got = play_product(rewritten(model_type, "fp32", exits), spoken, plan)
        what = label(model_type, "fp32", plan, spoken)
        assert_trace_equal(got, want, spoken, what, layers=count)


def check_plans(model_type: str, spoken: Script) -> None:
    """(e): the plans agree, on the caches of the skipped layers too."""
    ee = rewritten(model_type)
    dense = play_product(ee, spoken, "dense")
    for plan in ("compact", "auto"):
        got = play_product(ee, spoken, plan)
        assert_trace_equal(got, dense, spoken, label(model_type, "fp32", plan, spoken))
