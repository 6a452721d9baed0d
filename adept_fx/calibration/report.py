"""A calibration as tables, as text and as a picture."""

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from adept_fx.calibration.result import Calibration, Candidate, PhaseCalibration
from adept_fx.printing import as_text


def tables(found: Calibration) -> Iterator[Table | str]:
    """Per phase, what was tested, and the promise."""
    for phase in found.phases:
        if phase.curve:
            yield _table(phase)
        yield verdict(found, phase)


def _table(phase: PhaseCalibration) -> Table:
    table = Table(
        title=f"{phase.phase}: thresholds chosen on {phase.selected_on} texts, tested on "
        f"{phase.certified_on} others",
        title_justify="left",
    )
    for name in ("thresholds", "saved", "risk", "at most", "p-value"):
        table.add_column(name, justify="right")
    table.add_column("")
    for item in phase.curve:
        thresholds = ", ".join(f"{value:.4f}" for value in item.thresholds)
        numbers = (_percent(item.risk), _percent(item.bound), _number(item.p_value))
        saved = f"{item.saved:.1%}" if item.tested else f"~{item.saved:.1%}"
        table.add_row(thresholds, saved, *numbers, _word(item, phase))
    return table


def _word(item: Candidate, phase: PhaseCalibration) -> str:
    if not item.tested:
        return "not tested"
    if not item.passed:
        return "failed"
    last = [other for other in phase.curve if other.passed][-1]
    return "chosen" if item is last else "passed"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def verdict(found: Calibration, phase: PhaseCalibration) -> str:
    """The promise in words, or why there is none."""
    alpha = 1.0 - found.target
    if phase.certified:
        return (
            f"{phase.phase}: with {found.confidence:.0%} confidence the risk ({found.risk_name}) "
            f"is at most {alpha:.2%}; {_percent(phase.risk)} on {phase.certified_on} texts, by "
            f"which it is at most {_percent(phase.bound)}. {phase.saved:.1%} of the token-layers "
            "are saved."
        )
    texts = phase.selected_on + phase.certified_on
    if not phase.curve:
        return (
            f"{phase.phase}: nothing that these gates could save keeps the risk "
            f"({found.risk_name}) at {alpha:.2%} on the {phase.selected_on} texts that chose the "
            "thresholds: they are 1.0."
        )
    needed = (
        f"about {phase.texts_needed} like these would be needed"
        if phase.texts_needed is not None
        else "nor could any number of texts like these"
    )
    return (
        f"{phase.phase}: {texts} texts cannot support a risk ({found.risk_name}) of at most "
        f"{alpha:.2%} with {found.confidence:.0%} confidence; {needed}. The thresholds are 1.0."
    )


def text(found: Calibration) -> str:
    """The same as text, without colours."""
    return as_text(tables(found))


def plot(file: Path, found: Calibration) -> None:
    """Risk against saved token-layers, with the promise as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(found.phases), 4), layout="constrained")
    axes = figure.subplots(1, len(found.phases), squeeze=False)[0]
    for axis, phase in zip(axes, found.phases, strict=True):
        tested = [item for item in phase.curve if item.tested]
        saved = [100 * item.saved for item in tested]
        axis.plot(saved, [100 * (item.risk or 0.0) for item in tested], "o-", label="risk")
        axis.plot(saved, [100 * (item.bound or 0.0) for item in tested], "s--", label="at most")
        axis.axhline(100 * (1.0 - found.target), color="tab:red", label="promise")
        if phase.certified:
            axis.axvline(100 * phase.saved, color="gray", linewidth=0.8, label="chosen")
        axis.set_xlabel("token-layers saved, %")
        axis.set_ylabel(f"risk ({found.risk_name}), %")
        axis.set_title(phase.phase)
        axis.legend()
    figure.savefig(file, dpi=120)
