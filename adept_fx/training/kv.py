"""The loss of KV maps: what exits do to the tokens that come later."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from adept_fx.gates.base import Gate, GateInputs
from adept_fx.runtime.handle import Adept
from adept_fx.training.observe import last_states, other_gates


class _Random(Gate):
    """Lets tokens go at random, wherever the thresholds are below 1."""

    keeps_python_state = True

    def __init__(self, share: float, generator: torch.Generator) -> None:
        super().__init__()
        self.share = share
        self.generator = generator

    def forward(self, tokens: GateInputs) -> Tensor:
        count = tokens.hidden.shape[0]
        chance = torch.rand(count, generator=self.generator) < self.share
        return chance.float().to(tokens.hidden.device)


def random_exits(
    adept: Adept, share: float, generator: torch.Generator
) -> AbstractContextManager[None]:
    """Every token leaves at each exit point by that chance, in the dense plan."""
    gates = [_Random(share, generator) for _ in adept.gates]
    return other_gates(adept, gates, threshold=0.5)


class KVLoss:
    """KL of later tokens to the whole model, and the error of synthesized keys and values.

    Both are seen in a forward in which tokens leave at random: what a map does wrong in one layer
    reaches every layer behind it, as it does when the model is used.

    Args:
        ee: The rewritten model.
        weight: Weight of the error.
        tokens: Largest number of tokens whose KL counts.
        generator: Where chance comes from.
    """

    def __init__(self, ee: Any, weight: float, tokens: int, generator: torch.Generator) -> None:
        self.ee = ee
        self.adept: Adept = ee.adept
        self.weight = weight
        self.tokens = tokens
        self.generator = generator

    def __call__(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss on texts padded on the right, and what there is to log."""
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), self.adept.disabled():
            wanted, whole = self._run(given)
        # Each exit point gets its turn at being left by many, and by few.
        share = float(torch.rand((), generator=self.generator))
        with random_exits(self.adept, share, self.generator):
            found, cache = self._run(given)
        depth, layers = self.adept.last_depth, self.adept.num_layers
        if depth is None:
            raise RuntimeError("the forward left no depths")
        real = given["attention_mask"].bool()
        divergence = self._divergence(found, wanted, (depth == layers) & real)
        error = self._error(cache, whole, depth, real)
        log = {"kv_kl": divergence.detach(), "kv_error": error.detach()}
        return divergence + self.weight * error, log

    def _run(self, given: dict[str, Tensor]) -> tuple[Tensor, DynamicCache]:
        cache = DynamicCache(config=self.ee.config)
        with last_states(self.adept.decoder) as states:
            self.adept.decoder(**given, past_key_values=cache, use_cache=True)
        return states[0], cache

    def _divergence(self, found: Tensor, wanted: Tensor, whole: Tensor) -> Tensor:
        """Of tokens that ran all layers: what differs is what they attended to."""
        chosen = whole.flatten().nonzero().squeeze(1)
        if len(chosen) > self.tokens:
            order = torch.rand(len(chosen), generator=self.generator).argsort()[: self.tokens]
            chosen = chosen[order.to(chosen.device)]
        if not len(chosen):
            return found.sum() * 0.0
        said, final = (
            F.log_softmax(self.adept.final_logits(states.flatten(0, 1)[chosen]).float(), -1)
            for states in (found, wanted)
        )
        return F.kl_div(said, final, reduction="batchmean", log_target=True)

    def _error(self, cache: Any, whole: Any, depth: Tensor, real: Tensor) -> Tensor:
        """Squared error of synthesized entries by the size of those of the whole model."""
        parts = []
        for layer in range(self.adept.config.exit_layers[0], self.adept.num_layers):
            skipped = (depth <= layer) & real
            for mine, theirs in zip(_entries(cache, layer), _entries(whole, layer), strict=True):
                # A sliding layer keeps the last tokens alone; what keeps states has no entries.
                rows = skipped[:, -mine.shape[-2] :]
                if not rows.any() or mine.shape != theirs.shape:
                    continue
                ours, full = (item.float().transpose(1, 2)[rows] for item in (mine, theirs))
                parts.append((ours - full).square().mean() / full.square().mean().clamp(min=1e-12))
        return torch.stack(parts).mean() if parts else depth.new_zeros((), dtype=torch.float32)


def _entries(cache: Any, layer: int) -> list[Tensor]:
    if layer >= len(cache.layers):
        return []
    held = cache.layers[layer]
    found = (getattr(held, name, None) for name in ("keys", "values"))
    return [item for item in found if isinstance(item, Tensor) and item.ndim == 4]
