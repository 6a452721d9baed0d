"""The loss of gates and exit adapters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adept_fx.errors import ConfigError
from adept_fx.gates.base import Gate, GateInputs
from adept_fx.training.config import FitConfig
from adept_fx.training.losses import (
    Said,
    agreement_loss,
    class_loss,
    preference_loss,
)
from adept_fx.training.observe import Observation


class ExitLoss:
    """Loss of all exits on the tokens of an observation.

    Args:
        ee: The rewritten model.
        config: How to train.
        parts: What is trained.
    """

    def __init__(self, ee: Any, config: FitConfig, parts: tuple[str, ...]) -> None:
        self.adept = ee.adept
        self.config = config
        self.adapters = "adapters" in parts
        self.gates = "gates" in parts
        self.exits = ee.adept.config.exit_layers
        self.layers = ee.adept.num_layers

    def __call__(self, seen: Observation) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and what there is to log, by name."""
        with torch.no_grad():
            final = F.log_softmax(self.adept.final_logits(seen.final).float(), -1)
        total = final.new_zeros(())
        log: dict[str, Tensor] = {}
        for index, layers in enumerate(self.exits):
            inputs = seen.inputs[index]
            with torch.set_grad_enabled(self.adapters and torch.is_grad_enabled()):
                logits = self.adept.early_logits(inputs.hidden, index)
            said = Said(F.log_softmax(logits.float(), -1), final, seen.targets)
            if self.adapters:
                # Of a language model the whole model is the teacher; of a classifier the label is.
                loss = said.divergence.mean() + (class_loss(said) if self.adept.pools else 0.0)
                total = total + loss
                log[f"kl_{layers}"] = said.divergence.mean()
            log |= self._traces(layers, said)
            if self.gates and learns(self.adept.gates[index]):
                score = self._score(self.adept.gates[index], inputs, logits.detach())
                loss = self._gate_loss(score, said, layers)
                total = total + loss
                log[f"gate_loss_{layers}"] = loss
        return total, {name: value.detach() for name, value in log.items()}

    def _score(self, gate: Gate, inputs: GateInputs, logits: Tensor) -> Tensor:
        given = replace(inputs, logits=logits) if "logits" in gate.needs else inputs
        score: Tensor = gate(given)
        return score

    def _gate_loss(self, score: Tensor, said: Said, layers: int) -> Tensor:
        config = self.config
        if config.objective == "agreement":
            return agreement_loss(score, said.agrees)
        saved = (self.layers - layers) / self.layers
        gain = self._gain(said).detach()
        if config.quality == "likelihood":  # the last token of a text has nothing to be told by
            score, gain = score[said.known], gain[said.known]
        return preference_loss(score, gain, saved, config.quality_weight, config.compute_weight)

    def _gain(self, said: Said) -> Tensor:
        """``T_exit - T_full``."""
        if self.config.quality == "kl":
            return -said.divergence
        early, final = said.likelihoods()
        return early - final

    @torch.no_grad()
    def _traces(self, layers: int, said: Said) -> dict[str, Tensor]:
        quality = self._gain(said)
        if self.config.quality == "likelihood":
            quality = said.likelihoods()[0][said.known]
        return {
            f"agreement_{layers}": said.agrees.float().mean(),
            f"T_{layers}": quality.mean(),
            f"C_{layers}": torch.tensor(layers / self.layers),
        }


def learns(gate: Gate) -> bool:
    """Whether a gate has anything to learn."""
    return any(True for _ in gate.parameters())


def check_quality(ee: Any, config: FitConfig) -> None:
    """Raises if the model does not say what exits are to be told by.

    Raises:
        ConfigError: There is no next token whose likelihood the objective could ask for, or there
            are no two classes to choose between.
    """
    wanted = config.objective == "adept" and config.quality == "likelihood"
    if wanted and not ee.adept.pools and ee.get_output_embeddings() is None:
        raise ConfigError(
            f"{type(ee).__name__} predicts no next token, whose likelihood could be the quality",
            hint='use quality="kl"',
        )
    if ee.adept.pools and getattr(ee.config, "num_labels", 2) < 2:
        raise ConfigError(
            f"{type(ee).__name__} has one output: no class that exits could agree on",
            hint="exits of a regression cannot be trained",
        )
    if ee.adept.pools and config.batch_size > 1 and ee.config.pad_token_id is None:
        raise ConfigError(
            f"{type(ee).__name__} finds the end of a text by its padding, but has no pad_token_id",
            hint="set ee.config.pad_token_id, or batch_size=1",
        )
