"""`FitConfig`: what is trained, towards what, and for how long."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import Any

from adept_fx.errors import ConfigError

PARTS = ("gates", "adapters", "kv_maps")
"""What may be trained beside the model."""

_CHOICES = {
    "objective": ("agreement", "adept"),
    "quality": ("kl", "likelihood"),
    "mode": ("online", "cached"),
    "backbone": (None, "lora"),
}
_COUNTS = ("steps", "batch_size", "length", "tokens_per_step", "cached_tokens", "lora_rank")
_NUMBERS = (
    "learning_rate",
    "gate_learning_rate",
    "quality_weight",
    "compute_weight",
    "kv_weight",
    "layer_dropout",
    "early_exit_weight",
    "backbone_learning_rate",
)


@dataclass(frozen=True)
class FitConfig:
    """How :func:`adept_fx.fit` trains. Whatever is invalid raises `ConfigError`.

    Attributes:
        train: Which of ``"gates"``, ``"adapters"`` and ``"kv_maps"``; None for all that the model
            has. The model itself stays as it is, unless `backbone` says otherwise.
        objective: Of gates. ``"agreement"``: does the token say here what the whole model says?
            Binary cross entropy in which both answers weigh the same (CALM, arXiv:2207.07061).
            ``"adept"``: the Bradley-Terry preference for leaving over going on,
            ``sigmoid(quality_weight * (T_exit - T_full) + compute_weight * (C_full - C_exit))``,
            with the quality `T` and the share of layers `C` (ADEPT, arXiv:2601.03700).
        quality: `T` of the objective ``"adept"``: minus the KL divergence from the whole model, or
            the log-likelihood of the next token of the text; in nats.
        quality_weight: Weight of a nat.
        compute_weight: Weight of all layers.
        steps: Optimizer steps.
        batch_size: Texts per step, on each device.
        length: Longest piece of text, in tokens; at least 2.
        tokens_per_step: At how many tokens of a step's texts exits are trained, chosen at random:
            the head is applied to each of them once per exit point.
        learning_rate: Peak of adapters and maps (AdamW; warmed up over 5 %, then cosine).
        gate_learning_rate: Peak of gates: new ones have a long way to go from "never".
        kv_weight: Weight of the error of keys and values beside the KL divergence of later tokens,
            for ``"kv_maps"``.
        mode: ``"online"`` runs the model in every step. ``"cached"`` first writes its hidden states
            to `cache_dir` and then reads them from there; gates and adapters alone.
        cache_dir: Where the states of ``"cached"`` lie; a run that was cut off goes on there.
        cached_tokens: How many tokens are cached.
        backbone: ``"lora"`` first trains the model itself by the recipe of LayerSkip
            (arXiv:2404.16710): layer dropout and an early exit loss, through LoRA (PEFT) that is
            merged into the weights at the end.
        backbone_steps: Optimizer steps of that; None for `steps`.
        backbone_learning_rate: Peak of that.
        lora_rank: Rank of those.
        layer_dropout: Chance that the last layer is left out for a text; less for earlier ones.
        early_exit_weight: Weight of the early exit loss beside that of the last layer.
        seed: Of everything random.
        output_dir: Where the Trainer keeps checkpoints, and goes on from the last one; None for a
            temporary folder and no checkpoints.
        plot: A PNG with the curves (needs matplotlib).
        trainer: Further arguments of `transformers.TrainingArguments`: logging, mixed precision ...
    """

    train: tuple[str, ...] | None = None
    objective: str = "agreement"
    quality: str = "kl"
    quality_weight: float = 5.0
    compute_weight: float = 1.0
    steps: int = 500
    batch_size: int = 8
    length: int = 256
    tokens_per_step: int = 1024
    learning_rate: float = 2e-3
    gate_learning_rate: float = 1e-2
    kv_weight: float = 0.1
    mode: str = "online"
    cache_dir: str | Path | None = None
    cached_tokens: int = 100_000
    backbone: str | None = None
    backbone_steps: int | None = None
    backbone_learning_rate: float = 1e-3
    lora_rank: int = 16
    layer_dropout: float = 0.1
    early_exit_weight: float = 1.0
    seed: int = 0
    output_dir: str | Path | None = None
    plot: str | Path | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks all that needs no model."""
        if self.train is not None:
            one = isinstance(self.train, str) or not isinstance(self.train, Iterable)
            chosen = (self.train,) if one else tuple(self.train)
            unknown = [part for part in chosen if part not in PARTS]
            if unknown or not chosen:
                hint = f"known: {', '.join(PARTS)}"
                raise ConfigError(f"train={short(self.train)} is not understood", hint=hint)
            object.__setattr__(self, "train", tuple(part for part in PARTS if part in chosen))
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                hint = f"known: {', '.join(map(repr, known))}"
                raise ConfigError(f"{name}={short(getattr(self, name))} is unknown", hint=hint)
        for name in _COUNTS:
            _check_count(name, getattr(self, name))
        if self.backbone_steps is not None:
            _check_count("backbone_steps", self.backbone_steps)
        for name in _NUMBERS:
            _check_number(name, getattr(self, name))
        _check_count("seed", self.seed, least=0)
        _check_count("length", self.length, least=2)
        if not isinstance(self.trainer, Mapping):
            raise ConfigError(
                f"trainer must map names to values, not {short(self.trainer)}",
                hint='for example: trainer={"logging_steps": 10}',
            )
        if self.layer_dropout >= 1:
            raise ConfigError(f"layer_dropout must be below 1, not {self.layer_dropout}")
        self._check_mode()

    def _check_mode(self) -> None:
        if self.mode == "cached" and self.cache_dir is None:
            raise ConfigError(
                'mode="cached" needs a cache_dir', hint="name a folder for the states"
            )
        if self.mode == "cached" and "kv_maps" in (self.train or ()):
            raise ConfigError(
                "KV maps are trained through the layers behind them, which are not run on states",
                hint='use mode="online", or leave "kv_maps" out of train',
            )


def _check_count(name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**32:
        raise ConfigError(f"{name} must be a whole number of at least {least}, not {short(value)}")


def _check_number(name: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < float("inf"):  # type: ignore[operator]
        raise ConfigError(f"{name} must be a finite number of at least 0, not {short(value)}")
