"""What a calibration found."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adept_fx.files import require_matplotlib


@dataclass(frozen=True)
class Candidate:
    """Thresholds on the way from saving little to saving much.

    Attributes:
        thresholds: One per exit point.
        saved: Share of the phase's token-layers that are not run: measured if it was tested, else
            estimated.
        risk: Mean loss of the texts that certify; None if it was not tested.
        p_value: Of "the risk is above ``1 - target``"; None if it was not tested.
        bound: What the risk is below of, at the calibration's confidence and for this candidate
            alone; None if it was not tested.
        tested: Whether the fixed sequence came that far.
        passed: Whether it was tested and passed.
        losses: Per text, in the order of the test; empty if it was not tested.
    """

    thresholds: tuple[float, ...]
    saved: float
    risk: float | None = None
    p_value: float | None = None
    bound: float | None = None
    tested: bool = False
    passed: bool = False
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class PhaseCalibration:
    """The promise for one phase.

    Attributes:
        phase: ``"prefill"`` or ``"decode"``.
        selected_on: Texts that chose the candidates.
        certified_on: Other texts, that tested them.
        curve: The candidates, in the order of the test.
        thresholds: Those chosen; 1.0 if no candidate passed.
        risk: Expected risk: the mean loss of the texts that certify. None if none passed.
        bound: What the risk is below of, with the wanted confidence. None if none passed.
        saved: Expected share of the phase's token-layers that are not run.
        texts_needed: Texts in all that would have supported the promise, if they were like these;
            None if it is supported, or if no number would do.
    """

    phase: str
    selected_on: int
    certified_on: int
    curve: tuple[Candidate, ...]
    thresholds: tuple[float, ...]
    risk: float | None
    bound: float | None
    saved: float
    texts_needed: int | None = None

    @property
    def certified(self) -> bool:
        """Whether the thresholds keep the promise."""
        return any(item.passed for item in self.curve)

    @property
    def losses(self) -> list[list[float]]:
        """Per tested candidate, the loss of each text, in the order of the test."""
        return [list(item.losses) for item in self.curve if item.tested]


@dataclass(frozen=True)
class Calibration:
    """What :func:`adept_fx.calibrate` found: per phase, a promise and what it rests on.

    With probability ``confidence`` over the texts that were drawn, the thresholds of each certified
    phase have a risk of at most ``1 - target`` on texts like those.

    Attributes:
        target: One minus the risk that must not be exceeded.
        confidence: Of each phase's promise by itself.
        risk_name: ``"agreement"``, ``"nll"`` or the name of the caller's function.
        bound_name: ``"hoeffding-bentkus"`` or ``"betting"``.
        exits: The exit points, in layers.
        phases: In the order of calibration.
    """

    target: float
    confidence: float
    risk_name: str
    bound_name: str
    exits: tuple[int, ...]
    phases: tuple[PhaseCalibration, ...]

    def phase(self, name: str) -> PhaseCalibration:
        """What was found for a phase.

        Raises:
            KeyError: It was not calibrated.
        """
        return {item.phase: item for item in self.phases}[name]

    def to_dict(self, losses: bool = False) -> dict[str, Any]:
        """For JSON.

        Args:
            losses: With the loss of each text.
        """
        found = asdict(self)
        for phase, kept in zip(found["phases"], self.phases, strict=True):
            phase["certified"] = kept.certified
            phase["thresholds"] = list(kept.thresholds)
            phase["curve"] = list(phase["curve"])
            for candidate in phase["curve"]:
                candidate["thresholds"] = list(candidate["thresholds"])
                candidate["losses"] = list(candidate["losses"])
                if not losses:
                    del candidate["losses"]
        phases = {phase.pop("phase"): phase for phase in found["phases"]}
        return found | {"exits": list(self.exits), "phases": phases}

    def plot(self, file: str | Path) -> None:
        """Draws risk against saved token-layers, per phase.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        require_matplotlib()
        from adept_fx.calibration.report import plot

        plot(Path(file), self)

    def __str__(self) -> str:
        """The tables as text."""
        from adept_fx.calibration.report import text

        return text(self)
