"""Models and texts for the tests of calibration."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

import adept_fx
from adept_fx.gates.base import Gate, GateInputs
from adept_fx.gates.max_prob import MaxProb
from models import tiny

EXITS = (1, 2)


class Sees(Gate):
    """A score that depends on the state alone, the same at all exits."""

    per_token = True

    def forward(self, tokens: GateInputs) -> Tensor:
        return torch.sigmoid(tokens.hidden[:, 0].float())


class Says(Gate):
    """The same score for every token."""

    per_token = True

    def __init__(self, score: float) -> None:
        super().__init__()
        self.score = score

    def forward(self, tokens: GateInputs) -> Tensor:
        return torch.full_like(tokens.hidden[:, 0], self.score, dtype=torch.float32)


@torch.no_grad()
def decided(after: int, left: float = 0.0) -> Any:
    """A model of four layers, of which those from `after` on change nothing, or little."""
    model: Any = tiny("llama")
    for layer in model.model.layers[after:]:
        layer.self_attn.o_proj.weight.mul_(left)
        layer.mlp.down_proj.weight.mul_(left)
    return model


def rewritten(model: Any, gate: Any = "max_prob", **options: Any) -> Any:
    return adept_fx.transform(model, adept_fx.ExitConfig(exits=EXITS, gate=gate, **options))


# Of the layers behind the first: how much of what they change is left.
LEFT = {"random": 1.0, "easy": 0.15, "certain": 0.0}


@cache
def _shared(kind: str) -> Any:
    return rewritten(decided(after=1, left=LEFT[kind]))


def fresh(kind: str = "easy", gate: Gate | None = None) -> Any:
    """A model that tests share, as if nothing had been calibrated before.

    Args:
        kind: `"certain"`: every exit agrees; `"easy"`: most do; `"random"`: few do.
        gate: Of all exits; the largest probability if it is left out.
    """
    ee = _shared(kind)
    ee.adept.set_gates(MaxProb() if gate is None else gate)
    ee.adept.thresholds = ee.adept.prefill_thresholds = 0.9
    ee.adept.calibration = ee.adept.online = None
    return ee


def texts(count: int, length: int = 12, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(3, 100, (count, length), generator=generator))
