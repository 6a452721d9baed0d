"""A transformed model of a test's own, for tests that change it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import adept_fx
from adept_fx import ExitConfig
from models import tiny

LAYERS, EXITS = 3, (1, 2)
IDS = torch.arange(1, 15).view(2, 7)
POSITIONS = torch.arange(7).expand(2, 7)
PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


def fresh(gate: Any = "linear", threshold: float = 1.0, **fields: Any) -> tuple[Any, Any]:
    """A model of its own, because the test changes it, and its transform; dense is bitwise."""
    model = tiny("llama", layers=LAYERS, **fields)
    ee = adept_fx.transform(model, ExitConfig(exits=EXITS, gate=gate, threshold=threshold))
    ee.adept.plan = "dense"
    return model, ee


def logits(model: Any, ids: Tensor = IDS, mask: Tensor | None = PADDED) -> Tensor:
    """At real tokens; always the form of call that `transform` captures."""
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=POSITIONS).logits
    return out if mask is None else out[mask.bool()]
