"""What a text loses by tokens that leave early: a number in [0, 1]."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adept_fx.errors import ConfigError

RISKS = ("agreement", "nll")
RiskFunction = Callable[[Tensor, Tensor, Tensor], Any]


class Risk(ABC):
    """A loss per text, of what its logits were early and of the whole model.

    Attributes:
        name: For reports.
        small: Whether what is kept of the logits takes little memory.
        least: How many numbers the model must emit per token.
        needs_next: Whether those must be about the next token.
    """

    name: str
    small = True
    least = 1
    needs_next = False

    @abstractmethod
    def keep(self, logits: Tensor, following: Tensor | None) -> Tensor:
        """What the loss reads.

        Args:
            logits: ``[B, S, V]``, or ``[B, 1, classes]`` of row classifiers.
            following: The token behind each position, ``[B, S]``; -1 where the text ends. None
                for classifiers.

        Returns:
            ``[B, S, ...]``.
        """

    @abstractmethod
    def loss(self, early: Tensor, full: Tensor, ids: Tensor) -> float:
        """The loss of one text in [0, 1].

        Args:
            early: What was kept, ``[S, ...]``.
            full: The same of the whole model.
            ids: The tokens at these positions, ``[S]``; the whole text for row classifiers.
        """

    def check(self, logits: Tensor, is_language_model: bool) -> None:
        """Checks that the model's logits ``[..., V]`` have such a risk.

        Raises:
            ConfigError: They have not.
        """
        if self.needs_next and not is_language_model:
            raise ConfigError(
                f"risk={self.name!r} needs a model that predicts next tokens",
                hint="use risk='agreement'",
            )
        if logits.shape[-1] < self.least:
            raise ConfigError(
                f"the model emits {logits.shape[-1]} number per token: nothing can disagree",
                hint="pass risk=f with f(early_logits, full_logits, ids) in [0, 1]",
            )


class Agreement(Risk):
    """Share of the tokens whose most likely token, or class, is not that of the whole model."""

    name = "agreement"
    least = 2

    def keep(self, logits: Tensor, following: Tensor | None) -> Tensor:
        """Most likely tokens ``[B, S]``."""
        return logits.argmax(-1)

    def loss(self, early: Tensor, full: Tensor, ids: Tensor) -> float:
        """Share that differs."""
        return float((early != full).double().mean())


class LossRise(Risk):
    """By what share the mean negative log-likelihood of the next token is above the full model's.

    Clipped to [0, 1]; a text that the full model knows by heart loses all if it loses anything.
    """

    name = "nll"
    needs_next = True

    def keep(self, logits: Tensor, following: Tensor | None) -> Tensor:
        """Negative log-likelihoods ``[B, S]`` in nats; 0 where the text ends."""
        if following is None:
            raise ConfigError("risk='nll' needs next tokens")
        logs = F.log_softmax(logits.float(), -1)
        found = -logs.gather(-1, following.clamp(min=0)[..., None])[..., 0]
        return torch.where(following < 0, 0.0, found)

    def loss(self, early: Tensor, full: Tensor, ids: Tensor) -> float:
        """The rise."""
        now, before = float(early.double().sum()), float(full.double().sum())
        if now <= before:
            return 0.0
        # Also if either is not a number.
        return min((now - before) / before, 1.0) if before > 0.0 and now > before else 1.0


class Custom(Risk):
    """The caller's own: ``f(early_logits, full_logits, ids)``, of one text each."""

    small = False

    def __init__(self, function: RiskFunction, is_row: bool = False) -> None:
        self.function = function
        self.is_row = is_row
        self.name = str(getattr(function, "__name__", type(function).__name__))

    def keep(self, logits: Tensor, following: Tensor | None) -> Tensor:
        """All of them."""
        return logits

    def loss(self, early: Tensor, full: Tensor, ids: Tensor) -> float:
        """What the function says, checked.

        Raises:
            ConfigError: It is no number in [0, 1].
        """
        if self.is_row:
            early, full = early[0], full[0]
        found = self.function(early, full, ids)
        try:
            value = float(found)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"risk {self.name} returned {found!r}, not a number") from error
        if not 0.0 <= value <= 1.0:  # false for NaN, too
            raise ConfigError(
                f"risk {self.name} returned {value}",
                hint="a text's loss must be in [0, 1]: the promise rests on it; scale or clip it",
            )
        return value


def build_risk(risk: str | RiskFunction, is_row: bool) -> Risk:
    """The risk of that name, or the caller's own.

    Args:
        risk: A name or a function.
        is_row: Whether the model classifies rows.

    Raises:
        ConfigError: Neither.
    """
    if risk == "agreement":
        return Agreement()
    if risk == "nll":
        return LossRise()
    if isinstance(risk, str) or not callable(risk):
        raise ConfigError(
            f"unknown risk {risk!r}", hint=f"known: {', '.join(RISKS)}, or a function"
        )
    return Custom(risk, is_row)
