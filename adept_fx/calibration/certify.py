"""Learn then Test: some texts choose thresholds to try, others test them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from adept_fx.calibration.path import Path, levels
from adept_fx.calibration.result import Candidate, PhaseCalibration
from adept_fx.calibration.statistics import fixed_sequence, risk_bound, texts_needed
from adept_fx.calibration.trial import Trial, set_thresholds
from adept_fx.errors import InputError

_SELECT = 3  # one text of so many chooses, the others certify


class Certifier:
    """Chooses candidates on some texts and tests them on others.

    Args:
        trial: The model and all texts.
        alpha: The largest risk.
        delta: Probability of a false promise.
        bound: How p-values are computed.
        seed: Chooses the texts that choose.
    """

    def __init__(self, trial: Trial, alpha: float, delta: float, bound: str, seed: int) -> None:
        self.trial = trial
        self.alpha, self.delta, self.bound, self.seed = alpha, delta, bound, seed

    def run(self, phase: str) -> PhaseCalibration:
        """The promise for a phase; its thresholds are set."""
        known = self.trial.fitting(phase)
        if not known:
            raise InputError(
                f"no text is long enough for {phase}", hint="give texts of at least four tokens"
            )
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(self.seed))
        shuffled = [known[int(at)] for at in order]
        cut = max(len(known) // _SELECT, 1)
        chosen, held = shuffled[:cut], shuffled[cut:]
        curve = tuple(self._tested(phase, self._candidates(phase, chosen), held))
        best = next((item for item in reversed(curve) if item.passed), None)
        never = (1.0,) * len(self.trial.adept.config.exit_layers)
        thresholds = never if best is None else best.thresholds
        set_thresholds(self.trial.adept, phase, thresholds)
        return PhaseCalibration(
            phase,
            selected_on=len(chosen),
            certified_on=len(held),
            curve=curve,
            thresholds=thresholds,
            risk=best.risk if best else None,
            bound=best.bound if best else None,
            saved=best.saved if best else 0.0,
            texts_needed=self._needed(curve) if best is None and curve else None,
        )

    def _candidates(self, phase: str, which: list[int]) -> list[Candidate]:
        """From saving little to saving much, none twice."""
        path = Path(self.trial.record(phase, which))

        def measure(thresholds: tuple[float, ...]) -> float:
            return float(self.trial.measure(phase, thresholds, which)[0].mean())

        wanted = levels(path, measure, self.alpha)
        found = dict.fromkeys(path.thresholds(level) for level in wanted)
        outcomes = {thresholds: path.seen.outcome(thresholds)[1] for thresholds in found}
        return [Candidate(item, saved) for item, saved in outcomes.items() if saved > 0.0]

    def _tested(
        self, phase: str, candidates: list[Candidate], which: list[int]
    ) -> Iterator[Candidate]:
        """The candidates, with what the texts that certify say of those that are tested."""
        measured: list[tuple[Tensor, float]] = []

        def losses() -> Iterator[Tensor]:
            for item in candidates:
                measured.append(self.trial.measure(phase, item.thresholds, which))
                yield measured[-1][0]

        found = fixed_sequence(losses() if which else (), self.alpha, self.delta, self.bound)
        for item, value, (lost, saved) in zip(candidates, found, measured, strict=False):
            yield Candidate(
                item.thresholds,
                saved,
                risk=float(lost.mean()),
                p_value=value,
                bound=risk_bound(lost, self.delta, self.bound),
                tested=True,
                passed=value <= self.delta,
                losses=tuple(lost.tolist()),
            )
        yield from candidates[len(found) :]

    def _needed(self, curve: tuple[Candidate, ...]) -> int | None:
        """How many texts in all would have supported the first candidate."""
        losses: Tensor = torch.tensor(curve[0].losses, dtype=torch.float64)
        count = texts_needed(losses, self.alpha, self.delta, self.bound)
        return None if count is None else -(-count * _SELECT // (_SELECT - 1))
