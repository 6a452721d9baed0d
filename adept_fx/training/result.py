"""What a training did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adept_fx.files import require_matplotlib


@dataclass(frozen=True)
class FitResult:
    """What :func:`adept_fx.fit` did.

    Attributes:
        parts: What was trained beside the model.
        exits: The exit points, in layers.
        steps: Optimizer steps taken.
        seconds: How long it took.
        history: The Trainer's log: losses, and per exit point ``e`` the agreement with the whole
            model ``agreement_e``, the quality ``T_e`` (nats) and the share of layers ``C_e``.
        backbone: The same of the model's own training; empty if it was left as it is.
    """

    parts: tuple[str, ...]
    exits: tuple[int, ...]
    steps: int
    seconds: float
    history: list[dict[str, float]]
    backbone: list[dict[str, float]]

    def last(self, name: str) -> float:
        """The last logged value of a name; NaN if there is none."""
        values = [entry[name] for entry in self.history if name in entry]
        return values[-1] if values else float("nan")

    def __str__(self) -> str:
        """What the exits say now, in a line each."""
        trained = ", ".join(self.parts) or "the backbone"
        lines = [f"trained {trained} in {self.steps} steps and {self.seconds:.0f} s"]
        for layers in self.exits:
            agreement = self.last(f"agreement_{layers}")
            quality = self.last(f"T_{layers}")
            if agreement == agreement:
                lines.append(f"after {layers} layers: agreement {agreement:.1%}, T {quality:.3f}")
        return "\n".join(lines)

    def plot(self, file: str | Path) -> None:
        """Draws losses, agreement and quality by step into a PNG.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        require_matplotlib()
        from matplotlib.figure import Figure

        figure: Any = Figure(figsize=(12, 4), layout="constrained")
        panels = figure.subplots(1, 3)
        history = self.history or self.backbone
        groups: tuple[tuple[str, Callable[[str], bool]], ...] = (
            (
                "loss",
                lambda name: name != "train_loss" and ("loss" in name or name.startswith("k")),
            ),
            ("agreement", lambda name: name.startswith("agreement_")),
            ("T, nats (quality)", lambda name: name.startswith("T_")),
        )
        for panel, (title, wanted) in zip(panels, groups, strict=True):
            names = dict.fromkeys(n for entry in history for n in entry if wanted(n))
            for name in names:
                points = [(e["step"], e[name]) for e in history if name in e]
                share = self.last(f"C_{name.rpartition('_')[2]}")
                label = f"{name} (C {share:.2f})" if name.startswith("T_") else name
                panel.plot([x for x, _ in points], [y for _, y in points], label=label)
            panel.set_title(title, fontsize=9)
            panel.set_xlabel("step")
            if names:
                panel.legend(fontsize=7)
        figure.savefig(file, dpi=120)
