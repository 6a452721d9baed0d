"""A scan as tables, as text and as a picture."""

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from adept_fx.printing import as_text
from adept_fx.scanning.result import Scan


def tables(scan: Scan) -> Iterator[Table | str]:
    """What tokens would say at each exit point, what that would save, and the answer."""
    first = Table(title=f"What {scan.tokens} tokens would say", title_justify="left")
    for name in ("after", "agreement", "KL", "loss", "agree here first"):
        first.add_column(name, justify="right")
    for layer in scan.layers:
        numbers = (f"{layer.agreement:.1%}", f"{layer.divergence:.3f}", f"{layer.loss:.3f}")
        first.add_row(str(layer.after), *numbers, f"{layer.earliest:.1%}")
    first.add_row(f"all {scan.num_layers}", "100.0%", "0.000", f"{scan.loss:.3f}", "")
    yield first
    second = Table(title="What untrained exits would save (gate max_prob)", title_justify="left")
    for name in ("agreement", "exits", "threshold", "token-layers saved"):
        second.add_column(name, justify="right")
    for item in scan.proposals:
        exits = ", ".join(map(str, item.exits)) or "none"
        second.add_row(f"{item.target:.0%}", exits, f"{item.threshold:.4f}", f"{item.saved:.1%}")
    second.add_row("100%", "all", "no mistakes", f"{scan.perfect:.1%}")
    yield second
    yield scan.verdict


def text(scan: Scan) -> str:
    """The same as text, without colours."""
    return as_text(tables(scan))


def plot(file: Path, scan: Scan, title: str) -> None:
    """Agreement and loss by layers run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    left = figure.subplots()
    depths = [layer.after for layer in scan.layers]
    left.plot(depths, [layer.agreement for layer in scan.layers], "o-", label="agreement")
    left.bar(depths, [layer.earliest for layer in scan.layers], alpha=0.3, label="agree here first")
    left.set_xlabel(f"layers run, of {scan.num_layers}")
    left.set_ylim(0.0, 1.0)
    left.legend(loc="upper left")
    right = left.twinx()
    right.plot(depths, [layer.loss for layer in scan.layers], "s--", color="tab:red", label="loss")
    right.axhline(scan.loss, color="tab:red", linewidth=0.8)
    right.set_ylabel("loss, nats")
    right.legend(loc="upper right")
    left.set_title(title, fontsize=9)
    figure.savefig(file, dpi=120)
