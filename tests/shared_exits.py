"""Rewritten models and their saved exits, for the tests of `adept_fx.sharing`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import load as parse
from safetensors.torch import save as serialize
from torch import Tensor

import adept_fx
from adept_fx import ExitConfig
from adept_fx.errors import CheckpointError
from adept_fx.gates.registry import build_gates
from models import tiny

LAYERS, EXITS = 3, (1, 2)
IDS = torch.arange(1, 15).view(2, 7)
CONFIG, TENSORS, CARD = "exit_config.json", "exits.safetensors", "README.md"


quick = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def trained(ee: Any, seed: int = 5) -> Any:
    """Gates whose scores differ from token to token, around one half."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in ee.adept.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return ee


@cache
def _pair(dtype: torch.dtype) -> tuple[Any, Any]:
    model = tiny("llama", dtype, layers=LAYERS)
    return model, adept_fx.transform(model, ExitConfig(EXITS, "linear"))


def made(gate: Any = "linear", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A base and its rewritten form with trained gates, at threshold 0.5.

    A transform takes seconds: tests share it, and all that they may have changed is set anew.
    """
    model, ee = _pair(dtype)
    ee.adept.set_gates(build_gates(ExitConfig(EXITS, gate), 32, dtype=dtype))
    ee.adept.thresholds = ee.adept.prefill_thresholds = 0.5
    ee.adept.calibration = None
    ee.name_or_path = ""
    return model, trained(ee)


def fresh(gate: Any = "linear", model: Any = None) -> tuple[Any, Any]:
    """A pair of a test's own, which it may spoil."""
    model = tiny("llama", layers=LAYERS) if model is None else model
    return model, trained(adept_fx.transform(model, ExitConfig(EXITS, gate, threshold=0.5)))


@torch.no_grad()
def said(ee: Any) -> tuple[Tensor, Tensor]:
    """Logits, and where tokens left; in the form of call that `transform` captures."""
    ee.adept.plan = "dense"
    places = torch.arange(IDS.shape[1]).expand_as(IDS)
    return ee(IDS, position_ids=places).logits, ee.adept.last_depth


def rewrite_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the JSON in place; what `change` returns replaces it."""
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(change(values) or values))


def rewrite_tensors(folder: Path, data: bytes | Callable[[dict[str, Tensor]], Any]) -> None:
    """Replaces the tensors, and the hash of them, as someone who means it would."""
    if not isinstance(data, bytes):
        tensors = parse((folder / TENSORS).read_bytes())
        data = serialize(data(tensors) or tensors)
    (folder / TENSORS).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    rewrite_config(folder, lambda values: values.update(sha256=digest))


def refused(folder: Path, word: str) -> None:
    """`load` raises, and leaves the model alone."""
    model = made()[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = set(vars(model))
    with pytest.raises(CheckpointError, match=word):
        adept_fx.load(model, folder)
    assert set(vars(model)) == attributes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
