"""What checks found out, as JSON, as Markdown and as a table for the terminal.

Results are in the order of their subjects. The Markdown follows from the JSON alone and holds no
timings, so that a second run writes the same text.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from rich.table import Table
from rich.text import Text

from adept_fx.check.child import Limits
from adept_fx.check.reasons import reason_group, without_way_out
from adept_fx.check.result import CheckResult, Status

STATUSES: tuple[Status, ...] = ("passed", "refused", "unavailable", "failed")
_STYLES = {"passed": "green", "refused": "yellow", "unavailable": "dim", "failed": "bold red"}
_MEANINGS = {
    "passed": "every step passed",
    "refused": "`transform` refuses the model, saying why",
    "unavailable": "the original cannot be built or run here",
    "failed": "a step failed, crashed, or ran over its limits",
}
_PACKAGES = ("torch", "transformers")
_REASON = 160  # characters in a Markdown cell


@dataclass(frozen=True)
class Report:
    """The results of one run of ``adept-fx check``.

    Attributes:
        command: What was run.
        versions: Of the packages that the results depend on.
        limits: What each subject might use.
        results: One per subject, sorted by it.
    """

    command: str
    versions: dict[str, str]
    limits: Limits
    results: tuple[CheckResult, ...]

    @classmethod
    def of(cls, results: Iterable[CheckResult], command: str, limits: Limits) -> "Report":
        """A report of this machine's packages; results may come in any order."""
        versions = {name: version(name) for name in _PACKAGES}
        ordered = tuple(sorted(results, key=lambda result: result.subject))
        return cls(command, versions, limits, ordered)

    @property
    def counts(self) -> dict[Status, int]:
        """Number of results of each status, in the order of `STATUSES`."""
        found = Counter(result.status for result in self.results)
        return {status: found[status] for status in STATUSES}

    def groups(self, status: Status) -> list[tuple[str, int]]:
        """Groups of reasons of a status, with the number of results in each; large ones first."""
        reasons = (result.reason for result in self.results if result.status == status)
        return sorted(Counter(map(reason_group, reasons)).items(), key=lambda g: (-g[1], g[0]))


def to_json(report: Report) -> str:
    """The report as JSON, with the time that each result took in seconds."""
    results = [{**r.to_dict(), "seconds": round(r.seconds, 1)} for r in report.results]
    return json.dumps({**asdict(report), "results": results}, indent=1, ensure_ascii=False) + "\n"


def from_json(text: str) -> Report:
    """The inverse of `to_json`."""
    values = json.loads(text)
    return Report(
        values["command"],
        values["versions"],
        Limits(**values["limits"]),
        tuple(map(CheckResult.from_dict, values["results"])),
    )


def to_markdown(report: Report) -> str:
    """The report as a Markdown page."""
    limits = report.limits
    packages = " and ".join(f"{name} {number}" for name, number in report.versions.items())
    lines = [
        "# Checked models",
        "",
        f"Made by `{report.command}` with {packages}; do not edit. Each model ran in a process of",
        f"its own, with at most {limits.memory:g} GiB and {limits.seconds:g} s.",
        "",
        *_summary(report),
        "",
        *_markdown_row("type", "class", "status", "layers", "reason"),
        *_markdown_row(*["---"] * 5),
    ]
    for result in report.results:
        lines += _markdown_row(
            f"`{result.subject}`",
            str(result.facts.get("model_class", "")),
            result.status,
            kinds_of_layers(result),
            _escaped(_shortened(without_way_out(result.reason))),
        )
    return "\n".join(lines) + "\n"


def to_table(report: Report) -> Table:
    """The report as a table for the terminal."""
    table = Table(title=summary_line(report), title_justify="left")
    for name in ("model", "status", "layers", "seconds", "reason"):
        justify = "right" if name == "seconds" else "left"
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for result in report.results:
        table.add_row(
            Text(result.subject),
            Text(result.status, style=_STYLES[result.status]),
            Text(kinds_of_layers(result)),
            f"{result.seconds:.1f}",
            Text(_shortened(without_way_out(result.reason))),
        )
    return table


def summary_line(report: Report) -> str:
    """How many results there are of each status, in one line."""
    counts = ", ".join(f"{count} {status}" for status, count in report.counts.items() if count)
    return f"{len(report.results)} checked: {counts}" if counts else "nothing checked"


def kinds_of_layers(result: CheckResult) -> str:
    """The kinds of layers that the model has, as one text."""
    kinds: Any = result.facts.get("layer_kinds", [])
    return ", ".join(map(str, kinds))


def _summary(report: Report) -> list[str]:
    lines = [*_markdown_row("status", "models", "meaning"), *_markdown_row("---", "--:", "---")]
    for status, count in report.counts.items():
        lines += _markdown_row(f"**{status}**", str(count), _MEANINGS[status])
        for group, members in report.groups(status) if status == "refused" else []:
            lines += _markdown_row("", str(members), _escaped(_shortened(group)))
    return lines


def _markdown_row(*cells: str) -> list[str]:
    return [f"| {' | '.join(cells)} |"]


def _shortened(text: str) -> str:
    return text if len(text) <= _REASON else f"{text[: _REASON - 1].rstrip()}…"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, in one cell."""
    text = " ".join(text.split())
    for character in "\\`*|":
        text = text.replace(character, f"\\{character}")
    return text.replace("<", "&lt;")
