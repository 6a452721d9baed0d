"""What a module notes between two entries of the Trainer's log."""

from __future__ import annotations

from torch import nn


class Logged(nn.Module):
    """A module whose forward notes numbers, which the Trainer takes as means."""

    def __init__(self) -> None:
        super().__init__()
        self.log: dict[str, list[float]] = {}

    def note(self, name: str, value: float) -> None:
        """Notes a number of this step."""
        self.log.setdefault(name, []).append(value)

    def take_log(self) -> dict[str, float]:
        """Means of what was noted since the last time."""
        means = {name: sum(values) / len(values) for name, values in self.log.items()}
        self.log = {}
        return means
