"""What states and checkpoints were made of, so that nobody goes on with those of something else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adept_fx.errors import ConfigError
from adept_fx.training.config import FitConfig

_SAMPLED = 1024
_BACKBONE = (
    *("backbone", "backbone_steps", "steps", "batch_size", "length", "backbone_learning_rate"),
    *("lora_rank", "layer_dropout", "early_exit_weight", "seed"),
)


def identity(ee: Any, config: FitConfig) -> dict[str, Any]:
    """The model, its weights (without those of the exits) and exit points, as JSON types.

    What the backbone's training will make of the weights is told by its settings: the same ones
    may round differently on another day.
    """
    found: dict[str, Any] = {
        "model": type(ee).__name__,
        "weights": _weights(ee),
        "exits": list(ee.adept.config.exit_layers),
    }
    if config.backbone:
        found |= {name: getattr(config, name) for name in _BACKBONE}
    return found


def _weights(ee: Any) -> str:
    """Of some entries of every parameter, bit for bit: sums depend on the number of threads."""
    own = {id(parameter) for parameter in ee.adept.parameters()}
    others = [p for p in ee.parameters() if id(p) not in own]
    return digest(p.detach().flatten()[:: -(-p.numel() // _SAMPLED) or 1] for p in others)


def digest(tensors: Iterable[Tensor]) -> str:
    """A hash of tensors: their contents, sizes and dtypes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)} {tensor.dtype};".encode())
        found.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all, whenever the run is cut off."""
    new = file.with_name(f"{file.name}.{os.getpid()}.new")
    new.write_text(json.dumps(content), "utf-8")
    os.replace(new, file)


def read_json(file: Path, key: dict[str, Any], what: str, field: str) -> dict[str, Any] | None:
    """What a file holds; None if there is no file.

    Args:
        file: As :func:`write_json` left it.
        key: What its entry ``"key"`` must be.
        what: What the file's folder holds, for the message.
        field: The `FitConfig` field that names the folder.

    Raises:
        ConfigError: It is something else's.
    """
    if not file.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(file.read_text("utf-8"))
        same = content["key"] == key
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise ConfigError(
            f"{file.parent} holds {what} of another model, text or configuration",
            hint=f"name another {field}, or delete this one",
        )
    return content
