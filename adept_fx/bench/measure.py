"""Times arms in turn, and says how far two equal arms differ."""

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adept_fx.bench.arms import Arm

STEADY = 0.02
"""Equal arms that differ by no more are equal enough."""

_RESAMPLED = 1000
_LONGEST = 3.0


@dataclass(frozen=True)
class Times:
    """Seconds of each arm, round by round.

    Attributes:
        rounds: Seconds of each timed call.
    """

    rounds: dict[str, list[float]]

    def median(self, arm: str) -> float:
        """Median seconds of an arm."""
        return statistics.median(self.rounds[arm])

    def ratio(self, arm: str, base: Sequence[str]) -> float:
        """Median over the rounds of an arm's time by that of the base in the same round.

        A machine's speed drifts: what was measured side by side is compared.
        """
        return statistics.median(self._ratios(arm, base))

    def _ratios(self, arm: str, base: Sequence[str]) -> list[float]:
        count = len(self.rounds[arm])
        return [
            self.rounds[arm][at] / statistics.mean(self.rounds[name][at] for name in base)
            for at in range(count)
        ]

    def spread(self, first: str, second: str) -> float:
        """How far the ratio of two equal arms lies from 1, 19 times out of 20 (bootstrap)."""
        ratios = self._ratios(second, (first,))
        draw = random.Random(0)
        found = sorted(
            statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLED)
        )
        low, high = found[int(0.025 * _RESAMPLED)], found[int(0.975 * _RESAMPLED)]
        return max(abs(low - 1.0), abs(high - 1.0))


@torch.no_grad()
def measure(
    arms: Mapping[str, Arm],
    seconds: float,
    equal: tuple[str, str] | None = None,
    least: int = 10,
    most: int = 400,
) -> Times:
    """Calls the arms in turn, in an order that changes from round to round.

    Args:
        arms: What to time.
        seconds: No further round begins after so many seconds.
        equal: Two equal arms: as long as they differ by more than :data:`STEADY`, measuring goes
            on, up to three times as long. The other arms have no say in it.
        least: Rounds that are run in any case.
        most: Rounds that are enough, if equal arms agree.
    """
    for arm in arms.values():
        _timed(arm)
    times = Times({name: [] for name in arms})
    order, draw, began = list(arms), random.Random(1), time.perf_counter()
    count = 0
    while count < least or not _enough(times, time.perf_counter() - began, seconds, most, equal):
        draw.shuffle(order)
        for name in order:
            times.rounds[name].append(_timed(arms[name]))
        count += 1
    return times


def _enough(
    times: Times, spent: float, seconds: float, most: int, equal: tuple[str, str] | None
) -> bool:
    count = len(next(iter(times.rounds.values())))
    if spent <= seconds and count < most:
        return False
    if equal is None or spent > _LONGEST * seconds:
        return True
    # To look at it after every round would take longer than the round.
    return count % 10 == 0 and times.spread(*equal) <= STEADY


def _timed(arm: Arm) -> float:
    arm.prepare()
    _wait(arm)
    began = time.perf_counter()
    arm.call()
    _wait(arm)
    return time.perf_counter() - began


def _wait(arm: Arm) -> None:
    if arm.device.type == "cuda":
        torch.cuda.synchronize(arm.device)
