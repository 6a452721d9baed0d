"""Writes an explanation down: at most 40 rows of a label and a text."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from adept_fx.report.explanation import Crossing, Exit, Explanation, Layer, Projection, Refusal

Row: TypeAlias = tuple[str, str]

# Most rows of each section: longer ones lose their middle.
_LAYERS, _EXITS, _PROJECTIONS, _CROSSING, _NOTES = 8, 7, 6, 4, 6
_LINES = 6  # of an error's message: those of torch.export go on with a stack
_STYLES = {"refused": "bold yellow", "slow": "bold yellow"}
_KINDS = {
    "full_attention": "full attention",
    "sliding_attention": "sliding attention",
    "chunked_attention": "chunked attention",
    "recurrent": "recurrent",
}


def rows(explanation: "Explanation", settings: Sequence[Row] = ()) -> list[Row]:
    """The rows of an explanation.

    Args:
        explanation: The explanation.
        settings: Further rows, put behind the model's.
    """
    if explanation.refusal is not None:
        return [*_refused(explanation, explanation.refusal)]
    return [
        ("model", f"{explanation.model}, rewritten" + " and compiled" * explanation.compiled),
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
    indented = (body.replace("\n", "\n" + " " * width) for _, body in lines)
    return "\n".join(
        label.ljust(width) + body for (label, _), body in zip(lines, indented, strict=True)
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


def count(number: int) -> str:
    """A number of parameters, in three digits if it is large."""
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,}"


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers, in short: ``0..3, 6``; regular gaps as ``1, 3, .., 31``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] + 1 == number:
            runs[-1].append(number)
        else:
            runs.append([number])
    first = [run[0] for run in runs]
    steps = {b - a for a, b in pairwise(first)}
    if len(runs) > 3 and len(steps) == 1 and all(len(run) == 1 for run in runs):
        return f"{first[0]}, {first[1]}, .., {first[-1]}"
    return ", ".join(f"{r[0]}..{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def named(noun: str, numbers: Sequence[int]) -> str:
    """``layer 3``, ``layers 0..3``."""
    return f"{noun}{'s' * (len(numbers) > 1)} {ranges(numbers)}"


def _refused(explanation: "Explanation", refusal: "Refusal") -> Iterator[Row]:
    yield "model", explanation.model
    if explanation.decoder is not None:
        yield "decoder", _decoder(explanation)
    yield "refused", f"by {refusal.step} ({refusal.error})"
    lines = refusal.message.strip().splitlines()
    yield "reason", "\n".join([*lines[:_LINES], *["..."] * (len(lines) > _LINES)])
    if refusal.hint:
        yield "way out", refusal.hint


def _decoder(explanation: "Explanation") -> str:
    parts = [str(explanation.decoder)]
    if explanation.num_layers is not None:
        where = f" in {explanation.container!r}" if explanation.container else ""
        parts.append(f"{explanation.num_layers} layers{where}")
    if explanation.parameters is not None:
        parts.append(f"{count(explanation.parameters)} parameters")
    return ", ".join(parts)


def _elided(lines: list[Row], most: int) -> list[Row]:
    if len(lines) <= most:
        return lines
    left = len(lines) - most + 1
    return [*lines[: most - 2], ("", f"... {left} more ..."), lines[-1]]


def _layers(explanation: "Explanation") -> list[str]:
    """Equal layers as one line."""
    groups: dict[Layer, list[int]] = {}
    for layer in explanation.layers:
        groups.setdefault(replace(layer, index=0), []).append(layer.index)
    return [f"{ranges(found)}: {_layer(layer)}" for layer, found in groups.items()]


def _layer(layer: "Layer") -> str:
    parts = [_KINDS.get(kind, kind) for kind in layer.kinds if kind != "recurrent"]
    if layer.window is not None:
        parts.append(f"window {layer.window}")
    parts += [f"by {name}" for name in layer.attention]
    parts += ["by its own code"] * layer.own_attention
    if layer.key and layer.value:
        parts.append(f"keys {_width(layer.key)}, values {_width(layer.value)}")
    if layer.reads_keys_of:
        parts.append(f"reads the keys of {named('layer', layer.reads_keys_of)}")
    if layer.index_key:
        parts.append(f"index keys {layer.index_key}")
    if layer.mixer:
        parts.append("recurrent {} ({})".format(*layer.mixer))
    what = ", ".join(parts) or "nothing kept for later tokens"
    return f"{what}, {count(layer.parameters)} parameters"


def _width(item: tuple[int, int]) -> str:
    return f"{item[0]} x {item[1]}"


def _path(explanation: "Explanation") -> Iterator[Row]:
    """Stages and exit points, in the order of a token's way."""
    steps: list[list[Row]] = []
    for stage in explanation.stages:
        layers = named("layer", range(stage.first, stage.last + 1))
        kinds = ", ".join(f"{n} {_KINDS.get(k, k)}" for k, n in stage.kinds.items())
        line = f"{layers}: {count(stage.parameters)} parameters" + f" ({kinds})" * bool(kinds)
        steps.append([(f"stage {len(steps)}", line)])
    for at, item in enumerate(explanation.exits):
        steps[at].append((f"exit {item.after}", _exit(item)))
    if len(steps) > _EXITS + 1:
        left = len(steps) - _EXITS - 1
        steps[_EXITS - 1 : -2] = [[("", f"... {left + 1} more exit points ...")]]
    for step in steps:
        yield from step


def _exit(item: "Exit") -> str:
    gate = item.gate
    own = f"{count(gate.parameters)} parameters" if gate.parameters else ""
    asks = f"reads {', '.join(gate.needs)}" if gate.needs else ""
    about = "; ".join(part for part in (own, asks) if part)
    behind = list(dict.fromkeys(slot.layer for slot in item.slots))
    owed = f"for {named('layer', behind)}" if behind else "for no layer"
    return (
        f"gate {gate.name}{f' ({about})' * bool(about)}; leaving skips {item.skipped_share:.1%} "
        f"of the parameters; KV synthesis {owed}: {item.nodes} nodes"
    )


def _projections(explanation: "Explanation") -> list[Row]:
    """Those of the first exit point, which has them of most layers."""
    found = explanation.exits[0].projections if explanation.exits else ()
    return _elided([("kv", _projection(item)) for item in found], _PROJECTIONS)


def _projection(item: "Projection") -> str:
    forms = {
        "merged": "merged; one batched product after compile()",
        "stacked": "one batched product",
        "cut": f"layer by layer, cut to {item.computed} of {item.columns} columns",
        "plain": "layer by layer",
    }
    reason = f" ({item.reason})" if item.reason else ""
    return f"{item.weight}, {item.layers} layer{'s' * (item.layers != 1)}: {forms[item.form]}{reason}"


def _crossings(explanation: "Explanation") -> list[Row]:
    seen: dict[tuple[str, str], dict[Crossing, list[int]]] = {}
    for item in explanation.exits:
        for value in item.crossing:
            group = seen.setdefault((value.origin, value.layout), {})
            group.setdefault(value, []).append(item.after)
    return _elided([("crossing", _crossing(*item)) for item in seen.items()], _CROSSING)


def _crossing(key: tuple[str, str], values: "dict[Crossing, list[int]]") -> str:
    origin, layout = key
    origins = {"call": "inputs of the call", "prologue": "computed before the layers"}
    layouts = {"tokens": "gathered with the tokens", "rows": "picked by attention, row by row"}
    names = [f"{value.name} {_shape(value)}".rstrip() for value in values]
    shown = ", ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4)
    return f"{shown}: {origins.get(origin, f'computed by {origin}')}, {layouts[layout]}"


def _shape(value: "Crossing") -> str:
    return "" if value.shape is None else f"[{', '.join(map(str, value.shape))}]"
