"""Writes an explanation down: at most 40 rows of a label and a text."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from adept_fx.report import words
from adept_fx.report.facts import Crossing, Layer, Refusal

if TYPE_CHECKING:
    from adept_fx.report.explanation import Explanation

Row: TypeAlias = tuple[str, str]

# Most rows of each section: longer ones lose their middle. Exits come with a stage each.
_LAYERS, _EXITS, _PROJECTIONS, _CROSSING, _NOTES = 6, 7, 8, 3, 4
_LINES = 6  # of an error's message: those of torch.export go on with a stack
_STYLES = {"refused": "bold yellow", "slow": "bold yellow"}


def rows(explanation: "Explanation", settings: Sequence[Row] = ()) -> list[Row]:
    """The rows of an explanation.

    Args:
        explanation: The explanation.
        settings: Of a model that is rewritten already: rows to put behind the decoder's.
    """
    if explanation.refusal is not None:
        return list(_refused(explanation, explanation.refusal))
    state = ", accepted"
    if settings:
        state = ", compiled" if explanation.compiled else ", not compiled"
    return [
        ("model", f"{explanation.model}{state}"),
        ("decoder", _decoder(explanation)),
        *settings,
        *_elided([("layers", line) for line in _layers(explanation)], _LAYERS),
        *_path(explanation),
        *_projections(explanation),
        *_crossings(explanation),
        *_elided([(note.kind, note.text) for note in explanation.notes], _NOTES),
    ]


def plain(lines: Sequence[Row]) -> str:
    """The rows as text."""
    width = max((len(label) for label, _ in lines), default=0) + 2
    return "\n".join(
        label.ljust(width) + body.replace("\n", "\n" + " " * width) for label, body in lines
    )


def styled(lines: Sequence[Row]) -> Any:
    """The rows for a terminal, as ``rich`` prints them."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, body in lines:
        table.add_row(Text(label, style=_STYLES.get(label, "bold")), Text(body))
    return table


def _refused(explanation: "Explanation", refusal: Refusal) -> Iterator[Row]:
    yield "model", f"{explanation.model}, refused"
    if explanation.decoder is not None:
        yield "decoder", _decoder(explanation)
    yield "refused", f"at step {refusal.step!r} ({refusal.error})"
    lines = refusal.message.strip().splitlines()
    yield "reason", "\n".join([*lines[:_LINES], *["..."] * (len(lines) > _LINES)])
    if refusal.hint:
        yield "way out", refusal.hint


def _decoder(explanation: "Explanation") -> str:
    parts = [str(explanation.decoder)]
    if explanation.num_layers is not None:
        where = f", found by dataflow in {explanation.container!r}" if explanation.container else ""
        parts.append(f"{explanation.num_layers} layers{where}")
    if explanation.parameters is not None:
        parts.append(f"{words.count(explanation.parameters)} parameters")
    return ", ".join(parts)


def _elided(lines: list[Row], most: int) -> list[Row]:
    """Without the middle, if there are more than so many."""
    if len(lines) <= most:
        return lines
    return [*lines[: most - 2], ("", f"... {len(lines) - most + 1} more ..."), lines[-1]]


def _layers(explanation: "Explanation") -> list[str]:
    """Equal layers as one line."""
    groups: dict[Layer, list[int]] = {}
    for layer in explanation.layers:
        groups.setdefault(replace(layer, index=0), []).append(layer.index)
    return [f"{words.ranges(found)}: {words.layer(layer)}" for layer, found in groups.items()]


def _path(explanation: "Explanation") -> Iterator[Row]:
    """Stages and exit points, in the order of a token's way."""
    steps: list[list[Row]] = [
        [(f"stage {at}", words.stage(stage))] for at, stage in enumerate(explanation.stages)
    ]
    for step, item in zip(steps, explanation.exits, strict=False):
        step.append((f"exit {item.after}", words.exit_point(item)))
    if len(explanation.exits) > _EXITS:
        # The last step is the stage behind the last exit point.
        left = len(explanation.exits) - _EXITS + 1
        steps[_EXITS - 2 : -2] = [[("", f"... {left} more exit points ...")]]
    for step in steps:
        yield from step


def _projections(explanation: "Explanation") -> list[Row]:
    """Those of the first exit point, which has them of most layers."""
    found = explanation.exits[0].projections if explanation.exits else ()
    return _elided([("kv", words.projection(item)) for item in found], _PROJECTIONS)


def _crossings(explanation: "Explanation") -> list[Row]:
    """What crosses any exit point, by where it comes from."""
    groups: dict[tuple[str, str], dict[Crossing, None]] = {}
    for item in explanation.exits:
        for value in item.crossing:
            groups.setdefault((value.origin, value.layout), {})[value] = None
    found = [("crossing", words.crossing(list(values))) for values in groups.values()]
    return _elided(found, _CROSSING)
