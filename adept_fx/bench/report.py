"""The benchmark's table, file and picture."""

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import adept_fx
from adept_fx.bench.result import Bound, Row

_COLUMNS = (
    "base ms",
    "exits ms",
    "tokens/s",
    "ratio",
    "ideal",
    "efficiency",
    "A/A",
    "memory",
    "bounds",
)


def hardware(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else _processor()
    return {
        "device": str(device),
        "name": name,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "adept_fx": adept_fx.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(rows: Sequence[Row], title: str) -> Table:
    """All rows; times of noisy ones are not shown."""
    found = Table(title=title, title_justify="left")
    found.add_column("case")
    for name in _COLUMNS:
        found.add_column(name, justify="right")
    for row in rows:
        found.add_row(row.name, *_cells(row))
    return found


def line(row: Row) -> str:
    """One row in words."""
    warm_up = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in row.warm_up.items())
    shown = f"ratio {row.ratio:.3f}, ideal {row.ideal:.3f}, efficiency {row.efficiency:.2f}"
    if not row.steady:
        shown = "noisy"
    memory = f"{row.memory['exits'] / 2**20:.0f} of {row.memory['base'] / 2**20:.0f} MiB"
    return f"{row.name}: {shown}, A/A {row.spread:.1%}; {memory}; first call: {warm_up}"


def _cells(row: Row) -> list[str]:
    last = [f"{row.spread:.1%}", f"{row.memory_ratio:.3f}", _bounds(row)]
    if not row.steady:
        return ["noisy", "-", "-", "-", f"{row.ideal:.3f}", "-", *last]
    return [
        f"{row.base * 1e3:.2f}",
        f"{row.seconds * 1e3:.2f}",
        f"{row.tokens / row.seconds:.1f}",
        f"{row.ratio:.3f}",
        f"{row.ideal:.3f}",
        f"{row.efficiency:.2f}",
        *last,
    ]


def _bounds(row: Row) -> str:
    return "\n".join(_bound(row, bound) for bound in row.bounds)


def _bound(row: Row, bound: Bound) -> str:
    kind, limit = bound
    text = f"{kind} {'>=' if kind == 'efficiency' else '<='} {limit:.2f}"
    kept = row.keeps(bound)
    if kept is None:
        return text
    return f"[green]{text} kept[/]" if kept else f"[red]{text} missed[/]"


def write_json(file: Path, setting: dict[str, Any], rows: Sequence[Row], more: Any) -> None:
    """Everything that was measured."""
    content = {**setting, "rows": [row.to_dict() for row in rows], **more}
    file.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def plot(file: Path, rows: Sequence[Row], title: str) -> None:
    """Ratios and ideal ratios as bars."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.steady]
    figure = Figure(figsize=(9, 1.5 + 0.45 * len(shown)), layout="constrained")
    axes = figure.subplots()
    places = range(len(shown))
    axes.barh([p + 0.2 for p in places], [row.ratio for row in shown], 0.4, label="measured")
    axes.barh([p - 0.2 for p in places], [row.ideal for row in shown], 0.4, label="ideal")
    axes.set_yticks(list(places), [row.name for row in shown])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("time by that of the plain model")
    axes.set_title(title, fontsize=9)
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(file, dpi=120)
