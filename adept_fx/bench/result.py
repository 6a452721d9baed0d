"""One row of the benchmark's table."""

from dataclasses import asdict, dataclass
from typing import Any

Bound = tuple[str, float]

TOO_WIDE = 0.05
"""Rows whose equal arms differ by more say nothing."""


@dataclass(frozen=True)
class Row:
    """What was measured of a case.

    Attributes:
        name: The case.
        base: Median seconds of the plain model.
        seconds: Median seconds of the rewritten one.
        eager: Median seconds of the plain model without compilation; None if not asked for.
        ratio: The rewritten model's time by the plain one's, round by round.
        ideal: The same, if time followed the work.
        spread: How far two equal plain arms differ, 19 times out of 20.
        tokens: Tokens of one call.
        warm_up: Seconds of each arm's first call, compilation included.
        error: Largest difference of the last logits, as a share of the largest; None with exits.
        memory: Most bytes that a call of each arm holds at once.
        bounds: What the row has to keep: ``("ratio", most)``, ``("memory", most)`` (as a ratio to
            the plain model's) or ``("efficiency", least)``.
        recompiled: Graphs that were compiled after the warm-up.
    """

    name: str
    base: float
    seconds: float
    eager: float | None
    ratio: float
    ideal: float
    spread: float
    tokens: int
    warm_up: dict[str, float]
    error: float | None
    memory: dict[str, int]
    bounds: tuple[Bound, ...] = ()
    recompiled: int = 0

    @property
    def efficiency(self) -> float:
        """Ideal time by actual time."""
        return self.ideal / self.ratio

    @property
    def steady(self) -> bool:
        """Whether the machine was quiet enough for the row to say something."""
        return self.spread <= TOO_WIDE

    @property
    def memory_ratio(self) -> float:
        """The rewritten model's most memory by the plain one's."""
        return self.memory["exits"] / self.memory["base"]

    def keeps(self, bound: Bound) -> bool | None:
        """Whether a bound holds within the spread; None if the machine was too noisy to say."""
        kind, limit = bound
        if kind == "memory":
            return self.memory_ratio <= limit
        if not self.steady:
            return None
        if kind == "ratio":
            return self.ratio <= limit * (1.0 + self.spread)
        return self.efficiency >= limit * (1.0 - self.spread)

    @property
    def kept(self) -> bool | None:
        """Whether every bound holds; None without one, or if one cannot be judged."""
        found = [self.keeps(bound) for bound in self.bounds]
        if False in found:
            return False
        return None if None in found or not found else True

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        more = {
            "efficiency": self.efficiency,
            "memory_ratio": self.memory_ratio,
            "steady": self.steady,
            "kept": self.kept,
        }
        return asdict(self) | more
