"""Thresholds that follow the texts while the model runs."""

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from adept_fx.calibration.trial import set_thresholds
from adept_fx.errors import ConfigError
from adept_fx.runtime.handle import Adept
from adept_fx.runtime.run import Run, Settings
from adept_fx.runtime.watch import Watch, most_likely

_EDGE = 1e-4  # Beta densities are 0 or infinite at 0 and 1
# Scores that thresholds may take: more of them where scores of sure gates crowd.
_GRID = torch.linspace(-9.0, 9.0, 721, dtype=torch.float64).sigmoid()


@dataclass
class Scores:
    """Weight, sum and sum of squares of some scores.

    They start as one score spread evenly over [0, 1], so that they always have a variance.
    """

    weight: float = 1.0
    total: float = 0.5
    squares: float = 1 / 3

    def add(self, scores: Tensor) -> None:
        """Adds scores in [0, 1]."""
        self.weight += len(scores)
        self.total += float(scores.sum())
        self.squares += float(scores.square().sum())

    def forget(self, keep: float) -> None:
        """Keeps that share of what was seen."""
        self.weight, self.total, self.squares = (
            keep * value for value in (self.weight, self.total, self.squares)
        )

    def log_density(self, at: Tensor) -> Tensor:
        """Of the Beta distribution with their mean and variance."""
        mean = self.total / self.weight
        variance = self.squares / self.weight - mean**2
        spread = mean * (1.0 - mean)
        # A narrower one could not be told from a spike, a wider one is none.
        count = spread / min(max(variance, 1e-5), 0.99 * spread) - 1.0
        a, b = mean * count, (1.0 - mean) * count
        norm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
        return norm + (a - 1.0) * at.log() + (b - 1.0) * torch.log1p(-at)


@dataclass
class Mixture:
    """What was seen of one exit point: scores of tokens that agreed in the end, and of others.

    Attributes:
        start: The threshold that it starts from.
        prior: Weight of that start, in tokens.
        agreed: Scores of tokens that would have said there what they said in the end.
        differed: Scores of the others.
        seen: Weight of the tokens seen.
    """

    start: float
    prior: float
    agreed: Scores = field(default_factory=Scores)
    differed: Scores = field(default_factory=Scores)
    seen: float = 0.0

    def add(self, scores: Tensor, agrees: Tensor, keep: float) -> None:
        """Adds tokens, and forgets older ones and the start a little.

        Args:
            scores: ``[N]``; those that are not numbers are left out.
            agrees: ``[N]`` bool.
            keep: What remains of the old after each token.
        """
        known = ~scores.isnan()
        scores = scores[known].double().clamp(_EDGE, 1.0 - _EDGE)
        agrees, old = agrees[known], keep ** len(scores)
        for part, chosen in ((self.agreed, agrees), (self.differed, ~agrees)):
            part.forget(old)
            part.add(scores[chosen])
        self.prior, self.seen = self.prior * old, self.seen * old + len(scores)

    def own_threshold(self, target: float) -> float:
        """The smallest score above which the posterior probability of agreeing is the target."""
        agreed, differed = self.agreed, self.differed
        odds = agreed.log_density(_GRID) - differed.log_density(_GRID)
        posterior = torch.sigmoid(odds + math.log(agreed.weight / differed.weight))
        sure = (posterior >= target).nonzero()
        if not len(sure):
            return 1.0
        # Fitted densities may cross again near 1: above a sure score, none is less sure.
        below = (posterior[: int(sure[-1])] < target).nonzero()
        return float(_GRID[int(below[-1])]) if len(below) else 0.0

    def threshold(self, target: float) -> float:
        """Between the start and the own one, by what each rests on."""
        share = self.seen / (self.seen + self.prior)
        return min(max(share * self.own_threshold(target) + (1.0 - share) * self.start, 0.0), 1.0)


class BetaMixture:
    """Moves thresholds while the model runs, as FREE does (Bae et al. 2023, arXiv:2310.05424).

    Every ``every``-th forward of a phase is an audit: no token leaves in it, and what each exit
    point would have said is compared with what the token says in the end. Of the scores of tokens
    that agree, and of those that do not, a Beta distribution is kept each (by moments, older tokens
    are slowly forgotten). An exit's threshold moves to the smallest score above which the
    posterior probability of agreeing is at least the target; the thresholds that it started from
    count as ``prior`` tokens.

    **No guarantee is promised**: what :func:`adept_fx.calibrate` certified holds for the thresholds
    that it set, and until the first audit. An audit runs all layers, and the head on every token at
    every exit point: with every 32nd, some percent of the work. It does not change what is compiled
    or captured. Training forwards, and those inside of ``disabled()``, are not counted.

    Args:
        target: Wanted probability of agreeing, in (0, 1).
        thresholds: Per phase (``"prefill"``, ``"decode"``), one per exit point, to start from. Only
            these phases are audited.
        every: How many forwards of a phase are between two audits, the second included. It may be
            changed at any time.
        prior: How many tokens the start counts as.
        keep: What remains of a token's weight after the next token.

    Attributes:
        audits: Per phase, the audits so far.
        mixtures: Per phase, one per exit point.

    Raises:
        ConfigError: A number makes no sense.
    """

    def __init__(
        self,
        target: float,
        thresholds: Mapping[str, tuple[float, ...]],
        *,
        every: int = 32,
        prior: float = 256.0,
        keep: float = 0.9995,
    ) -> None:
        if not (0.0 < target < 1.0 and every >= 1 and prior > 0.0 and 0.0 < keep <= 1.0):
            raise ConfigError(
                f"target={target}, every={every}, prior={prior}, keep={keep} make no sense",
                hint="0 < target < 1, every >= 1, prior > 0, 0 < keep <= 1",
            )
        self.target, self.every, self.keep = target, every, keep
        self.audits = dict.fromkeys(thresholds, 0)
        self.mixtures = {
            phase: [Mixture(start, prior) for start in values]
            for phase, values in thresholds.items()
        }
        self._calls = dict.fromkeys(thresholds, 0)
        self._lock = threading.Lock()

    def enter(self, settings: Settings, tokens: int) -> Settings:
        """Makes an audit of every so many calls."""
        phase = "prefill" if tokens > 1 else "decode"
        with self._lock:
            if phase not in self._calls:
                return settings
            self._calls[phase] += 1
            if self._calls[phase] % self.every:
                return settings
        return replace(settings, thresholds=(1.0,) * len(settings.exits), watch=Watch())

    @torch.no_grad()
    def leave(self, adept: Adept, run: Run, hidden: Tensor) -> None:
        """Takes what an audit saw, and moves the thresholds of its phase."""
        watch = run.settings.watch
        if watch is None or len(watch.seen) != len(run.settings.exits):
            return
        states = hidden.flatten(0, 1)[watch.seen[0].positions]
        final = most_likely(states, adept.final_logits)
        self.update(
            adept,
            run.phase,
            [(item.scores.cpu(), (item.said == final).cpu()) for item in watch.seen],
        )

    def update(self, adept: Adept, phase: str, seen: list[tuple[Tensor, Tensor]]) -> None:
        """Adds what an audit saw.

        Args:
            adept: The handle whose thresholds move.
            phase: The phase.
            seen: Per exit point, scores ``[N]`` and whether the token agrees ``[N]``.
        """
        with self._lock:
            mixtures = self.mixtures[phase]
            for mixture, (scores, agrees) in zip(mixtures, seen, strict=True):
                mixture.add(scores, agrees, self.keep)
            self.audits[phase] += 1
            set_thresholds(adept, phase, tuple(item.threshold(self.target) for item in mixtures))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()
