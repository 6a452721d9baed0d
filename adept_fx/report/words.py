"""Says the parts of an explanation in a few words each."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from adept_fx.report.facts import Crossing, Exit, Layer, Projection, Stage

_KINDS = {
    "full_attention": "full attention",
    "sliding_attention": "sliding attention",
    "chunked_attention": "chunked attention",
}
_ORIGINS = {"call": "inputs of the call", "prologue": "computed before the layers"}
_LAYOUTS = {"tokens": "gathered with the tokens", "rows": "attention picks its rows"}
_NAMES = 4  # of values that cross an exit point


def count(number: int) -> str:
    """A number of parameters, in three digits if it is large."""
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,}"


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers, in short: ``0..3, 6``; with regular gaps ``1, 3, .., 31``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] + 1 == number:
            runs[-1].append(number)
        else:
            runs.append([number])
    first = [run[0] for run in runs]
    gaps = {b - a for a, b in pairwise(first)}
    if len(runs) > 3 and len(gaps) == 1 and all(len(run) == 1 for run in runs):
        return f"{first[0]}, {first[1]}, .., {first[-1]}"
    return ", ".join(f"{r[0]}..{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def named(noun: str, numbers: Sequence[int]) -> str:
    """``layer 3``, ``layers 0..3``."""
    return f"{noun}{'s' * (len(numbers) > 1)} {ranges(numbers)}"


def layer(item: Layer) -> str:
    """What a layer is."""
    parts = [_KINDS.get(kind, kind) for kind in item.kinds if kind != "recurrent"]
    if item.window is not None:
        parts.append(f"window {item.window}")
    parts += [f"by {name}" for name in item.attention]
    parts += ["by its own code"] * item.own_attention
    if item.key and item.value:
        parts.append(f"keys {_width(item.key)}, values {_width(item.value)}")
    if item.reads_keys_of:
        parts.append(f"reads the keys of {named('layer', item.reads_keys_of)}")
    if item.index_key:
        parts.append(f"index keys {item.index_key}")
    if item.mixer:
        parts.append("recurrent {} ({})".format(*item.mixer))
    return f"{', '.join(parts) or 'keeps nothing'}, {count(item.parameters)} parameters"


def _width(item: tuple[int, int]) -> str:
    return f"{item[0]} x {item[1]}"


def stage(item: Stage) -> str:
    """What a stage holds."""
    layers = named("layer", range(item.first, item.last + 1))
    kinds = ", ".join(f"{n} {_KINDS.get(kind, kind)}" for kind, n in item.kinds.items())
    return f"{layers}: {count(item.parameters)} parameters" + f" ({kinds})" * bool(kinds)


def exit_point(item: Exit) -> str:
    """What happens at an exit point."""
    gate = item.gate
    own = f"{count(gate.parameters)} parameters" if gate.parameters else ""
    asks = f"reads {', '.join(gate.needs)}" if gate.needs else ""
    about = "; ".join(part for part in (own, asks) if part)
    behind = list(dict.fromkeys(slot.layer for slot in item.slots))
    owed = f"KV synthesis for {named('layer', behind)} in {item.nodes} nodes"
    return (
        f"gate {gate.name}{f' ({about})' * bool(about)}; leaving skips {item.skipped_share:.1%} "
        f"of the decoder; {owed if behind else 'no keys to synthesize'}"
    )


def projection(item: Projection) -> str:
    """How one kind of projection is computed for skipped layers."""
    forms = {
        "merged": "merged, one batched product after compile()",
        "stacked": "one batched product where that is faster",
        "cut": f"layer by layer, cut to {item.computed} of {item.columns} columns",
        "plain": "layer by layer",
    }
    layers = f"{item.layers} layer{'s' * (item.layers != 1)}"
    reason = f" ({item.reason})" if item.reason else ""
    return f"{item.weight}, {layers}: {forms[item.form]}{reason}"


def crossing(values: Sequence[Crossing]) -> str:
    """Values of one origin and layout that cross exit points."""
    shapes = ["" if v.shape is None else f" [{', '.join(map(str, v.shape))}]" for v in values]
    names = [value.name + shape for value, shape in zip(values, shapes, strict=True)]
    more = f" and {len(names) - _NAMES} more" * (len(names) > _NAMES)
    origin = _ORIGINS.get(values[0].origin, f"computed by {values[0].origin}")
    return f"{', '.join(names[:_NAMES])}{more}: {origin}, {_LAYOUTS[values[0].layout]}"
