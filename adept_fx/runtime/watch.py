"""Looks on at a forward: what gates score, and what tokens would say if they left."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from adept_fx.runtime.handle import Adept
    from adept_fx.runtime.run import Run, Settings

# Logits of so many tokens are held at once: of all tokens of a long prompt they would be gigabytes.
_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Seen:
    """What one exit point says of its live tokens.

    Attributes:
        positions: ``b * S + s``, ``[N]``.
        scores: What the gate that runs there gave them, ``[N]`` float32.
        said: The most likely token or class if they left there, ``[N]`` int64.
    """

    positions: Tensor
    scores: Tensor
    said: Tensor


class Watch:
    """Looks on at one forward and changes nothing about it.

    Gates run where they always do, compiled stages included, so that the scores are those that
    decide and nothing is compiled or captured for the sake of looking.

    Attributes:
        seen: One per exit point that was reached, in order.
    """

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    @torch.no_grad()
    def see(
        self,
        positions: Tensor,
        scores: Tensor,
        states: Tensor,
        logits: Callable[[Tensor], Tensor],
    ) -> None:
        """Looks at the live tokens of the next exit point.

        Args:
            positions: ``b * S + s``, ``[N]``.
            scores: ``[N]``.
            states: The residual stream, ``[N, D]``.
            logits: Maps states ``[n, D]`` to logits ``[n, V]``.
        """
        self.seen.append(Seen(positions, scores.float(), most_likely(states, logits)))


@torch.no_grad()
def most_likely(states: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
    """The most likely token behind each state, ``[N]``, without holding all logits at once."""
    parts = [logits(part).argmax(-1) for part in states.split(_AT_ONCE) if len(part)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long, device=states.device)


class Observer(Protocol):
    """Takes part in a model's forwards: see ``ee.adept.online``."""

    def enter(self, settings: "Settings", tokens: int) -> "Settings":
        """Called before a forward with ``tokens`` new tokens per row; may change its settings."""
        ...

    def leave(self, adept: "Adept", run: "Run", hidden: Tensor) -> None:
        """Called after it, with its final states ``[B, S, D]``."""
        ...
