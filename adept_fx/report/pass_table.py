"""The table of passes in ``passes/README.md``, made from the classes themselves."""

import inspect

from adept_fx.graph.base import Pass
from adept_fx.pipeline import PIPELINE

BEGIN = "<!-- begin: adept_fx.report.pass_table -->"
END = "<!-- end -->"


def pass_table() -> str:
    """One row per pass, in the order of the pipeline, as Markdown."""
    rows = ["| | pass | needs | reaches | what it does |", "|---|---|---|---|---|"]
    rows += [_row(number, step) for number, step in enumerate(PIPELINE, start=1)]
    return "\n".join(rows)


def _row(number: int, step: type[Pass]) -> str:
    name = step.__module__.rpartition(".")[2]
    effect = inspect.cleandoc(step.__doc__ or "").partition("\n")[0]
    cells = (number, f"[`{name}`]({name}.py)", step.needs.name, step.reaches.name, effect)
    return f"| {' | '.join(map(str, cells))} |"


def updated(text: str) -> str:
    """``text`` with the present table between the markers.

    Raises:
        ValueError: The text has no markers.
    """
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"the text has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{pass_table()}\n{END}{after}"
