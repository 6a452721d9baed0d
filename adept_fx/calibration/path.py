"""A path of thresholds from "nobody leaves" to "everybody leaves", by what exits were seen to say.

Seen are tokens that nobody let go: what a token that leaves changes about others is not in here.
The path only says what to try, and in which order; how good it is, real forwards tell.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_PASSES = 4
_BETWEEN = 8  # steps from node to node
_HALVINGS = 8  # of a step
_TENTHS = (2, 4, 5, 6, 7, 8, 9)  # each is one more run over all texts
_PARTS = (0.25, 0.5, 1.0)
_STEP = 0.1  # of the way that is left, at least
_NEAR = 1.05  # levels whose ratio is below are not worth another run
# What a mistake costs, in shares of all token-layers: from "no saving is worth one" to "any is".
_PRICES = tuple(10.0 ** (3 - at / 6) for at in range(37))


@dataclass(frozen=True, eq=False)
class Recorded:
    """What ``E`` exit points said of ``T`` tokens.

    Attributes:
        scores: Of the gates, ``[E, T]``; NaN never leaves.
        wrong: Whether a token would say there what it does not say in the end, ``[E, T]`` bool.
        weight: Of a token in the mean risk of the texts, ``[T]``; sums to 1.
        share: Of a token in all token-layers, ``[T]``; sums to 1.
        exits: The exit points, in layers.
        num_layers: Layers of the model.
    """

    scores: Tensor
    wrong: Tensor
    weight: Tensor
    share: Tensor
    exits: tuple[int, ...]
    num_layers: int

    @cached_property
    def costs(self) -> Tensor:
        """Risk that a token adds by its exit point, or none: ``[E + 1, T]``."""
        costs = self.wrong.double() * self.weight
        return torch.cat((costs, torch.zeros_like(costs[:1])))

    @cached_property
    def gains(self) -> Tensor:
        """Share of all token-layers that it saves there: ``[E + 1, T]``."""
        left = [(self.num_layers - exit_) / self.num_layers for exit_ in (*self.exits, 0)]
        left[-1] = 0.0
        return torch.tensor(left, dtype=torch.float64)[:, None] * self.share

    @cached_property
    def ordered(self) -> tuple[Tensor, Tensor]:
        """Scores ``[E, T]`` from high to low, and whose they are."""
        known = self.scores.double().nan_to_num(nan=-1.0)
        return known.sort(dim=1, descending=True)

    def threshold(self, exit_index: int, count: int) -> float:
        """The one by which ``count`` tokens' scores are above it, fewer where scores are equal."""
        scores = self.ordered[0][exit_index]
        if not count:
            return 1.0
        value = float(scores[count]) if count < len(scores) else 0.0
        return min(max(value, 0.0), 1.0)

    def outcome(self, thresholds: tuple[float, ...]) -> tuple[float, float]:
        """Risk, and share of the token-layers saved, by these thresholds."""
        at = _exits_taken(self, torch.tensor(thresholds, dtype=torch.float64))[None]
        risk, saved = self.costs.gather(0, at).sum(), self.gains.gather(0, at).sum()
        return float(risk), float(saved)


def _leaves(seen: Recorded, thresholds: Tensor) -> Tensor:
    """Which tokens each exit point would let go, ``[E, T]``."""
    # As at run time: in the scores' dtype, and 1.0 means never, whatever the score.
    bars = thresholds.to(seen.scores.dtype)[:, None]
    return (seen.scores > bars) & (thresholds < 1.0)[:, None]


def _first(leaves: Tensor, offset: int, none: int) -> Tensor:
    """The first of the exit points that lets a token go, ``[T]``; ``none`` if none does."""
    if not len(leaves):
        return torch.full(leaves.shape[1:], none, dtype=torch.long)
    return torch.where(leaves.any(0), leaves.int().argmax(0) + offset, none)


def _exits_taken(seen: Recorded, thresholds: Tensor) -> Tensor:
    return _first(_leaves(seen, thresholds), 0, len(seen.exits))


def _best_counts(seen: Recorded, price: float, counts: list[int]) -> list[int]:
    """How many scores to be above each threshold, for most saving at a price of a mistake.

    One exit point after the other is given its best threshold while the others keep theirs. With
    mistakes that have a price, and no bound, none of them can use up what another needs.
    """
    counts = list(counts)
    worth = seen.gains - price * seen.costs
    for _ in range(_PASSES):
        before = list(counts)
        for index in range(len(seen.exits)):
            counts[index] = _best_count(seen, worth, counts, index)
        if counts == before:
            break
    return counts


def _best_count(seen: Recorded, worth: Tensor, counts: list[int], index: int) -> int:
    """The best threshold of one exit point, among all that differ on these tokens."""
    bars = [seen.threshold(at, count) for at, count in enumerate(counts)]
    leaves = _leaves(seen, torch.tensor(bars, dtype=torch.float64))
    later = _first(leaves[index + 1 :], index + 1, len(seen.exits))
    change = worth[index] - worth.gather(0, later[None])[0]
    change = torch.where(leaves[:index].any(0), 0.0, change)
    scores, order = (part[index] for part in seen.ordered)
    # Behind place k, k + 1 tokens leave; that needs a next score which is lower, and a threshold.
    following = torch.cat((scores[1:], scores.new_zeros(1)))
    possible = (scores > following) & (following < 1.0) & (scores > 0.0)
    total = change[order].cumsum(0).masked_fill(~possible, -torch.inf)
    best = int(total.argmax())
    # The sum of many tokens that change nothing is not exactly zero.
    return best + 1 if float(total[best]) > 1e-12 else 0


class Path:
    """Thresholds from nobody (level 0) to everybody (level :attr:`end`).

    Its nodes save most at falling prices of a mistake: the lower hull of what can be saved at what
    risk. Between them, as many scores more are above every threshold as it is far from node to
    node, so that a gate without any use still has a path. A level is the share of the token-layers
    that is saved: tokens that leave without a mistake cost something, too, as others attend to the
    keys that are synthesized for them, and a level must tell many of them from few.
    """

    def __init__(self, seen: Recorded) -> None:
        self.seen = seen
        nodes = [[0] * len(seen.exits)]
        for price in _PRICES:
            counts = _best_counts(seen, price, nodes[-1])
            if counts not in nodes:
                nodes.append(counts)
        nodes = nodes[:1] + sorted(nodes[1:], key=self._outcome)
        # A threshold never rises again: one that no token reaches any more may stand anywhere.
        self._nodes = torch.tensor(nodes, dtype=torch.float64).cummax(0).values
        self._places = torch.arange((len(nodes) - 1) * _BETWEEN + 1, dtype=torch.float64) / _BETWEEN
        found = [seen.outcome(self._between(float(at))) for at in self._places]
        # Risk and saved share there, `[2, places]`; neither falls.
        self._outcomes = torch.tensor(found, dtype=torch.float64).T.cummax(1).values.contiguous()

    def _last(self, which: int, bound: float) -> tuple[float, ...]:
        """The last thresholds of the path whose risk (0) or saved share (1) is within a bound."""
        at = max(int(torch.searchsorted(self._outcomes[which], bound, right=True)) - 1, 0)
        low = float(self._places[at])
        high = float(self._places[min(at + 1, len(self._places) - 1)])
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            within = self.seen.outcome(self._between(middle))[which] <= bound
            low, high = (middle, high) if within else (low, middle)
        return self._between(low)

    def _outcome(self, counts: list[int]) -> tuple[float, float]:
        bars = (self.seen.threshold(at, count) for at, count in enumerate(counts))
        return self.seen.outcome(tuple(bars))

    def _between(self, place: float) -> tuple[float, ...]:
        low = min(int(place), len(self._nodes) - 1)
        high = min(low + 1, len(self._nodes) - 1)
        counts = torch.lerp(self._nodes[low], self._nodes[high], place - low).round().int()
        return tuple(self.seen.threshold(at, int(count)) for at, count in enumerate(counts))

    @property
    def end(self) -> float:
        """The last level; 0 if there is nothing to save."""
        return float(self._outcomes[1, -1])

    def reached(self, risk: float) -> float:
        """The last level whose own mistakes are a risk of at most this."""
        return self.seen.outcome(self._last(0, risk))[1]

    def thresholds(self, level: float) -> tuple[float, ...]:
        """One per exit point; they save at most the level, of the tokens that chose the path."""
        return self._last(1, level)


def levels(
    path: Path, measure: Callable[[tuple[float, ...]], float], alpha: float, tries: int = 8
) -> list[float]:
    """Levels to test, ascending, that lead from well below a risk up to it.

    The last one is found between one that keeps the risk and one that does not: the risk grows
    ever faster with what is saved, and a chord from below comes close (with the weights of the
    Illinois method, so that both ends move).

    Args:
        path: The path.
        measure: The real risk of thresholds, on the texts that chose the path.
        alpha: The wanted risk.
        tries: How many levels may be measured.

    Returns:
        None if nothing can be saved, or if the risk is above alpha where nobody leaves.
    """
    if not path.end:
        return []
    known = {0.0: measure((1.0,) * len(path.seen.exits))}
    if known[0.0] > alpha:  # by what left before this phase
        return []
    low, high, weight = 0.0, path.end, 1.0
    kept: bool | None = None
    trial = path.reached(alpha) or high
    for _ in range(tries):
        known[trial] = measure(path.thresholds(trial))
        keeps = known[trial] <= alpha
        weight = weight / 2 if keeps == kept else 1.0
        low, high, kept = (trial, high, keeps) if keeps else (low, trial, keeps)
        if high < low * _NEAR:
            break
        trial = _trial(path, known, (low, high), alpha, weight if kept else 1 / weight)
    # By tenths of the risk, and by parts of the way where the risk says nothing.
    wanted = [_level(known, low, alpha * share / 10) for share in _TENTHS]
    return sorted({*wanted, *(low * share for share in _PARTS)} - {0.0})


def _trial(
    path: Path, known: dict[float, float], ends: tuple[float, float], alpha: float, weight: float
) -> float:
    """Where the risk may be alpha, between a level that is below it and one that is not."""
    low, high = ends
    if high in known:
        below, above = alpha - known[low], weight * (known[high] - alpha)
        return low + (high - low) * max(below / (below + above), _STEP)
    if known[low]:  # if it were a multiple of what mistakes alone would make of it
        scaled = path.reached(path.seen.outcome(path.thresholds(low))[0] * alpha / known[low])
        if low * _NEAR < scaled < high / _NEAR:
            return scaled
    return high


def _level(known: dict[float, float], end: float, risk: float) -> float:
    """Where a risk is reached, between levels whose risk is known; at most ``end``."""
    before, reached = 0.0, known[0.0]
    for at in sorted(at for at in known if 0.0 < at <= end):
        now = max(known[at], reached)  # more leave, so that a lower risk is chance
        if now >= risk:
            return before + (at - before) * max(risk - reached, 0.0) / max(now - reached, 1e-12)
        before, reached = at, now
    return before
