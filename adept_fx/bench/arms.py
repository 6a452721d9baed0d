"""The models that are timed against each other, each with a cache of its own."""

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from adept_fx.bench.cases import Case
from adept_fx.gates import MLP, Gate, Replay


class Arm(ABC):
    """Runs one call of a case, again and again.

    Args:
        model: What is called.
        case: The case.
        cache: ``"static"`` or ``"dynamic"``.
    """

    def __init__(self, model: Any, case: Case, cache: str) -> None:
        self.model = model
        self.case = case
        self.kind = cache
        self.device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        shape = (case.batch, case.prompt + 1)
        ids = torch.randint(0, model.config.vocab_size, shape, generator=generator)
        self.ids = ids.to(self.device)
        mask = case.mask()
        self.mask = None if mask is None else mask.to(self.device)
        self.cache: Any = None

    def _new_cache(self) -> Any:
        if self.kind == "dynamic":
            return DynamicCache(config=self.model.config)
        return StaticCache(config=self.model.config, max_cache_len=self.case.prompt + 64)

    def _prefill(self) -> Any:
        return self.model(
            self.ids[:, : self.case.prompt],
            attention_mask=self.mask,
            past_key_values=self.cache,
            logits_to_keep=1,
        )

    def prepare(self) -> None:
        """What a call needs, untimed: an empty cache, or one that ends with the prompt."""
        if self.case.phase == "prefill":
            self.cache = self._new_cache()
        elif self.cache is None:
            self.cache = self._new_cache()
            self._prefill()
        else:
            _rewind(self.cache, self.case.prompt)

    def call(self) -> Any:
        """The call that is timed."""
        if self.case.phase == "prefill":
            return self._prefill()
        places = torch.full_like(self.ids[:, -1:], self.case.prompt)
        mask = self.mask
        if mask is not None:
            places = mask.sum(1, keepdim=True)
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        return self.model(
            self.ids[:, -1:],
            attention_mask=mask,
            position_ids=places,
            past_key_values=self.cache,
        )

    @abstractmethod
    def compile(self, mode: str | None) -> None:
        """Compiles the model in place."""


class Plain(Arm):
    """The original model."""

    def compile(self, mode: str | None) -> None:
        """As ``model.compile()``."""
        self.model.compile(mode=mode)


class ExitAware(Arm):
    """The rewritten model, with gates that let the case's tokens go."""

    def __init__(self, model: Any, case: Case, cache: str) -> None:
        super().__init__(model, case, cache)
        self._replay: Replay | None = None
        adept = model.adept
        adept.thresholds = adept.prefill_thresholds = 1.0
        adept.set_gates(self._gates())
        if case.share:
            phase = "prefill_thresholds" if case.phase == "prefill" else "thresholds"
            setattr(adept, phase, 0.5)

    def _gates(self) -> list[Gate]:
        """Trained gates cost what these cost; those that replay cost next to nothing."""
        exits = self.model.adept.config.exit_layers
        if not self.case.share:
            size, weight = self.model.config.hidden_size, next(self.model.parameters())
            return [MLP(size, device=weight.device, dtype=weight.dtype) for _ in exits]
        scores = torch.zeros(len(exits), *self.case.leaving().shape, device=self.device)
        scores[exits.index(self.case.exit)] = self.case.leaving().to(self.device).float()
        self._replay = Replay([scores])
        return [self._replay] * len(exits)

    def _prefill(self) -> Any:
        if self.case.phase == "decode" and self._replay is not None:
            with self.model.adept.disabled():  # the scores are for the timed call
                return super()._prefill()
        return super()._prefill()

    def prepare(self) -> None:
        """As for the others; scores start again."""
        super().prepare()
        if self._replay is not None:
            self._replay.reset()

    def call(self) -> Any:
        """The call that is timed."""
        with nullcontext() if self.case.gates else self.model.adept.disabled():
            return super().call()

    def compile(self, mode: str | None) -> None:
        """As ``ee.adept.compile()``."""
        self.model.adept.compile(mode=mode)


def _rewind(cache: Any, length: int) -> None:
    """Forgets the last token: every timed call is the same step."""
    if isinstance(cache, StaticCache):
        layers: Any = cache.layers
        for layer in layers:
            layer.cumulative_length.fill_(length)
    else:
        surplus = cache.get_seq_length() - length
        if surplus:
            cache.crop(-surplus)


def difference(left: Any, right: Any) -> float:
    """Largest difference of two outputs' last logits, as a share of the largest logit."""
    a, b = left.logits[:, -1].float(), right.logits[:, -1].float()
    return float((a - b).abs().max() / a.abs().max())
