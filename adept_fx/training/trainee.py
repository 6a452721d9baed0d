"""What transformers' Trainer trains: the exits, around a model that stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adept_fx.errors import ConfigError
from adept_fx.training.config import FitConfig
from adept_fx.training.exits import ExitLoss, learns
from adept_fx.training.guard import flags_kept
from adept_fx.training.kv import KVLoss
from adept_fx.training.logged import Logged
from adept_fx.training.observe import Observation, observe


class Trainee(Logged):
    """Gates, adapters and KV maps as a module whose forward is their loss.

    The model is not part of it: checkpoints hold the exits alone, and no optimizer or wrapper
    ever sees a parameter of the model.

    Args:
        ee: The rewritten model.
        config: How to train.
        parts: What is trained.
    """

    def __init__(self, ee: Any, config: FitConfig, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.exits = nn.ModuleDict(trained_modules(ee, parts))
        self._ee = (ee,)  # in a tuple: it must not become a child
        self._config = config
        self._generator = torch.Generator().manual_seed(config.seed)
        self._exit_loss = ExitLoss(ee, config, parts) if {"gates", "adapters"} & {*parts} else None
        self._kv_loss = (
            KVLoss(ee, config.kv_weight, config.tokens_per_step, self._generator)
            if "kv_maps" in parts
            else None
        )

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """The loss of a batch of texts, or of states that were cached."""
        total = torch.zeros(())
        log: dict[str, Tensor] = {}
        if self._exit_loss is not None:
            total, log = self._exit_loss(self._observe(batch))
        if self._kv_loss is not None:
            loss, more = self._kv_loss(batch)
            total, log = total.to(loss.device) + loss, log | more
        for name, value in log.items():
            self.note(name, float(value))
        return {"loss": total}

    def _observe(self, batch: dict[str, Any]) -> Observation:
        known = batch.get("observation")
        if known is not None:
            return known.to(self._ee[0].device)  # type: ignore[no-any-return]
        seed = torch.rand(batch["input_ids"].numel(), generator=self._generator)
        with torch.no_grad():
            return observe(self._ee[0], batch, tokens=self._config.tokens_per_step, seed=seed)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What an optimizer takes: gates learn at a rate of their own."""
        rates = {"gates": self._config.gate_learning_rate}
        return [
            {"params": list(part.parameters()), "lr": rates.get(name, self._config.learning_rate)}
            for name, part in self.exits.items()
        ]


def trained_modules(ee: Any, parts: tuple[str, ...]) -> dict[str, nn.Module]:
    """The modules of the parts that are to be trained."""
    adept = ee.adept
    # A gate that serves several exit points is there once: checkpoints know no aliases.
    gates = nn.ModuleList(dict.fromkeys(adept.gates))
    found = {"gates": gates, "adapters": adept.adapters, "kv_maps": adept.kv_maps}
    return {part: found[part] for part in parts}


def parts_of(ee: Any, config: FitConfig) -> tuple[str, ...]:
    """What is to be trained.

    Raises:
        ConfigError: The model has none of it.
    """
    adept = ee.adept
    there = {
        "gates": any(learns(gate) for gate in adept.gate_list()),
        "adapters": bool(adept.adapters),
        "kv_maps": adept.kv_maps is not None and config.mode == "online",
    }
    ways = {
        "gates": 'ExitConfig(gate="mlp"): the present gates have no parameters',
        "adapters": "ExitConfig(adapter_rank=16)",
        "kv_maps": 'ExitConfig(kv="map")',
    }
    for part in config.train or ():
        if not there[part]:
            raise ConfigError(
                f"the model has no {part} to train", hint=f"transform with {ways[part]}"
            )
    chosen = config.train or tuple(part for part, present in there.items() if present)
    if not chosen and config.backbone is None:
        hint = "; or ".join(ways.values())
        raise ConfigError("the model has nothing to train", hint=f"transform with {hint}")
    return chosen


@contextmanager
def only_trainable(ee: Any, parts: tuple[str, ...]) -> Iterator[None]:
    """Gradients for these parts alone, which are float32 in the meantime.

    Half precision would round the steps of an optimizer away. What was before comes back.
    """
    modules = list(trained_modules(ee, parts).values())
    trained = [parameter for module in modules for parameter in module.parameters()]
    before = [(parameter.dtype, parameter.grad) for parameter in trained]
    with flags_kept(ee):
        try:
            ee.requires_grad_(False)
            for parameter in trained:
                parameter.grad = None
                wide = torch.promote_types(parameter.dtype, torch.float32)
                parameter.data = parameter.data.to(wide)
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, (dtype, grad) in zip(trained, before, strict=True):
                parameter.grad = None
                parameter.data = parameter.data.to(dtype)
                parameter.grad = grad
