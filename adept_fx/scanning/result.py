"""What a scan found."""

from dataclasses import asdict, dataclass
from typing import Any

from adept_fx.scanning.proposal import Proposal

_LITTLE = 0.05
_TARGET = 0.97


@dataclass(frozen=True)
class Layer:
    """What tokens would say if they left after some layers.

    Attributes:
        after: How many layers.
        agreement: Share of the tokens whose most likely next token is the whole model's.
        divergence: Mean KL divergence of the whole model's distribution from theirs, in nats.
        loss: Mean negative log-likelihood of the text's next token, in nats.
        earliest: Share of the tokens that agree here and at no exit point before.
    """

    after: int
    agreement: float
    divergence: float
    loss: float
    earliest: float


@dataclass(frozen=True)
class Scan:
    """Whether early exit is worth it for a model.

    Attributes:
        layers: One per exit point that was looked at.
        num_layers: Layers of the model.
        tokens: Tokens that were looked at.
        loss: Mean negative log-likelihood of the text's next token by the whole model, in nats.
        perfect: Share of the token-layers saved if every token left at the first exit point where
            it agrees.
        proposals: Per wanted agreement, the exit points that save most, and how much.
    """

    layers: tuple[Layer, ...]
    num_layers: int
    tokens: int
    loss: float
    perfect: float
    proposals: tuple[Proposal, ...]

    @property
    def pays(self) -> bool:
        """Whether untrained exits save something worth having at 97 % agreement."""
        return self.best.saved >= _LITTLE

    @property
    def best(self) -> Proposal:
        """The proposal for 97 % agreement, or for the agreement nearest to it."""
        return min(self.proposals, key=lambda item: abs(item.target - _TARGET))

    @property
    def verdict(self) -> str:
        """The answer in words."""
        best = self.best
        if self.pays:
            exits = ", ".join(map(str, best.exits))
            return (
                f"Untrained exits at {exits} with gate max_prob and threshold "
                f"{best.threshold:.3f} save {best.saved:.0%} of the token-layers at "
                f"{best.target:.0%} agreement on these tokens; a gate that makes no mistake would "
                f"save {self.perfect:.0%}."
            )
        if self.perfect >= 2 * _LITTLE:
            return (
                f"Untrained exits will not pay: at {best.target:.0%} agreement they save "
                f"{best.saved:.0%} of the token-layers. Trained gates can get nearer to the "
                f"{self.perfect:.0%} of a gate that makes no mistake."
            )
        return (
            f"Early exit will not pay: even a gate that makes no mistake saves {self.perfect:.0%} "
            "of the token-layers. This model decides in its last layers."
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"pays": self.pays, "verdict": self.verdict}

    def __str__(self) -> str:
        """The tables as text."""
        from adept_fx.scanning.report import text

        return text(self)
