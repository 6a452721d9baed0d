"""How long the first calls take where nothing has been compiled before."""

import time
from typing import Any

import torch
from torch._inductor.utils import fresh_cache

import adept_fx
from adept_fx.bench.arms import Arm, ExitAware, Plain
from adept_fx.bench.cases import Case
from adept_fx.bench.runner import Setting, forget

_PROMPT = 128


@torch.no_grad()
def first_calls(model: Any, setting: Setting, exit_layer: int) -> dict[str, float]:
    """Seconds until a first prompt and a first token, inductor's cache on disk being empty.

    Args:
        model: The plain model.
        setting: How to compile, and the exit points.
        exit_layer: Where tokens leave, once some do.

    Returns:
        ``base``; ``exits``, with gates of which none lets a token go, capture included; and
        ``leaving``, what the first prompt and token add of which half and all leave.
    """
    found = {"base": _cold(model, setting, exit_layer, exits=False)["plain"]}
    own = _cold(model, setting, exit_layer, exits=True)
    return found | {"exits": own["plain"], "leaving": own["leaving"]}


def _cold(model: Any, setting: Setting, exit_layer: int, exits: bool) -> dict[str, float]:
    forget(model)
    with fresh_cache():
        _settle()
        began = time.perf_counter()
        ee = None
        if exits:
            ee = adept_fx.transform(model, adept_fx.ExitConfig(exits=setting.exits))
            ee.adept.compile(mode=setting.mode)
        else:
            model.compile(mode=setting.mode)
        try:
            found = {"plain": _calls(ee or model, setting, ee is not None, 0.0, 0) - began}
            if ee is not None:
                began = time.perf_counter()
                found["leaving"] = _calls(ee, setting, True, 0.5, exit_layer) - began
        finally:
            if ee is not None:
                adept_fx.restore(ee)
            forget(model)
    return found


def _calls(model: Any, setting: Setting, exits: bool, share: float, exit_layer: int) -> float:
    """Runs a prompt and a token; returns the time."""
    arm: type[Arm] = ExitAware if exits else Plain
    for phase, leaving in (("prefill", share), ("decode", 1.0 if share else 0.0)):
        one = arm(model, Case(phase, 1, _PROMPT, leaving, exit_layer), setting.cache)
        one.prepare()
        one.call()
    return time.perf_counter()


def _settle() -> None:
    """Compiles something small: what every process pays once belongs to neither model."""
    torch.compile(lambda x: torch.relu(x).sum(-1))(torch.ones(8, 8))
