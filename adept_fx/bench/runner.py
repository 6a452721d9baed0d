"""Runs cases: builds the arms, compiles, measures."""

import gc
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.utils import counters

import adept_fx
from adept_fx.bench import ideal
from adept_fx.bench.arms import Arm, ExitAware, Plain, difference
from adept_fx.bench.cases import Case
from adept_fx.bench.measure import measure
from adept_fx.bench.memory import peak
from adept_fx.bench.result import Bound, Row

_EQUAL = ("base", "base again")


@dataclass(frozen=True)
class Setting:
    """How all cases of a run are measured.

    Attributes:
        exits: Exit points.
        compiled: Compile both models; else both run eagerly.
        eager: Time the plain model without compilation, too.
        mode: As in ``torch.compile``.
        cache: ``"static"`` or ``"dynamic"``.
        seconds: Time per case; up to three times as long on a noisy machine.
    """

    exits: tuple[int, ...]
    compiled: bool = True
    eager: bool = False
    mode: str | None = None
    cache: str = "static"
    seconds: float = 40.0


@torch.no_grad()
def run_case(model: Any, case: Case, setting: Setting, bounds: tuple[Bound, ...] = ()) -> Row:
    """Measures one case.

    Args:
        model: The plain model.
        case: The case.
        setting: How to measure.
        bounds: What the row has to keep.
    """
    forget(model)
    ee = adept_fx.transform(model, adept_fx.ExitConfig(exits=setting.exits))
    arms: dict[str, Arm] = {"exits": ExitAware(ee, case, setting.cache)}
    arms |= {name: Plain(model, case, setting.cache) for name in _EQUAL}
    if setting.eager and setting.compiled:
        arms["eager"] = Plain(_uncompiled(model), case, setting.cache)
    if setting.compiled:
        arms["exits"].compile(setting.mode)
        arms["base"].compile(setting.mode)
    try:
        warm_up, outputs = _first_calls(arms)
        before = counters["stats"]["unique_graphs"]
        times = measure(arms, setting.seconds, _EQUAL)
        recompiled = counters["stats"]["unique_graphs"] - before
        memory = {name: peak(arms[name]) for name in ("base", "exits")}
        found = ee.adept.explain()
    finally:
        adept_fx.restore(ee)
        forget(model)
    head = model.get_output_embeddings()
    count = sum(p.numel() for p in head.parameters()) if head is not None else 0
    share = ideal.work(case, found, model.config, model.dtype, count).share
    return Row(
        name=case.name,
        base=times.median("base"),
        seconds=times.median("exits"),
        eager=times.median("eager") if "eager" in arms else None,
        ratio=times.ratio("exits", _EQUAL),
        ideal=share,
        spread=times.spread(*_EQUAL),
        tokens=sum(case.lengths()) if case.phase == "prefill" else case.batch,
        warm_up={name: warm_up[name] for name in ("base", "exits")},
        error=None if case.share else difference(outputs["base"], outputs["exits"]),
        memory=memory,
        bounds=bounds,
        recompiled=recompiled,
    )


def _first_calls(arms: dict[str, Arm]) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds of each arm's first call, compilation included, and what it returned."""
    seconds, outputs = {}, {}
    for name, arm in arms.items():
        began = time.perf_counter()
        arm.prepare()
        outputs[name] = arm.call()
        seconds[name] = time.perf_counter() - began
    return seconds, outputs


def _uncompiled(model: Any) -> Any:
    """The same modules under a shell of their own, which a later ``compile()`` does not reach."""
    ee = adept_fx.transform(model, adept_fx.ExitConfig(exits=(1,)))
    return adept_fx.restore(ee)


def forget(model: Any) -> None:
    """Every case starts with nothing compiled, as a user's process does."""
    model._compiled_call_impl = None
    torch._dynamo.reset()
    gc.collect()
