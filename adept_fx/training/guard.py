"""What `fit` refuses before it starts, and what is as before when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from adept_fx.errors import ConfigError, UnsupportedModelError
from adept_fx.runtime.stats import Stats
from adept_fx.training.config import FitConfig

_SPLITTERS = ("FullyShardedDataParallel", "FSDPModule")


def require_packages(config: FitConfig) -> None:
    """Raises before states are written or LoRA is attached, and not after.

    Raises:
        ConfigError: accelerate, which the Trainer runs on, or PEFT is not installed.
    """
    wanted = {"accelerate": "transformers.Trainer"}
    if config.backbone:
        wanted["peft"] = f'backbone="{config.backbone}"'
    for package, what in wanted.items():
        if find_spec(package) is None:
            raise ConfigError(f"{what} needs {package}", hint="pip install 'adept-fx[train]'")


def refuse_split(model: nn.Module) -> None:
    """Raises if parameters are split over devices.

    Raises:
        UnsupportedModelError: Names a parameter, and what splits it.
    """
    for name, module in model.named_modules():
        # FSDP2 makes a class of its own for each class that it wraps.
        if any(base.__name__ in _SPLITTERS for base in type(module).__mro__):
            raise _split(f"module {name or 'model'}", "FSDP")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise _split(f"parameter {name}", "FSDP or a tensor-parallel plan")
        if hasattr(parameter, "ds_id"):
            raise _split(f"parameter {name}", "DeepSpeed ZeRO-3")
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise _split("the model", "a tensor-parallel plan")


def _split(what: str, by: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{what} is split over devices by {by}: a captured graph needs whole parameters",
        hint="train on one device, or with DDP (torchrun), where each device has them all",
    )


@contextmanager
def as_before(ee: Any) -> Iterator[None]:
    """Trains in `eval` mode with exits switched on; modes and statistics are put back.

    Modes are those of each module: a model in training may hold parts that are not.
    """
    adept = ee.adept
    modes = [(module, module.training) for module in ee.modules()]
    kept = adept.stats, adept.last_depth, adept._disabled
    try:
        ee.eval()
        adept.stats, adept._disabled = Stats(adept.config.exit_layers), 0
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        adept.stats, adept.last_depth, adept._disabled = kept


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Puts back which parameters take gradients."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
