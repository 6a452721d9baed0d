"""Counts of what left where, and of the work that was really done."""

import threading
from collections.abc import Sequence
from typing import Any

PHASES = ("prefill", "decode")


class Stats:
    """Statistics over all forwards since :meth:`reset`. Thread-safe.

    Attributes:
        exits: The exit points, in layers.
        seen: Per phase, real tokens that each exit's gate scored.
        exited: Per phase, tokens that left there: that their gate let go. Those that stop with
            their row, at a classification head, are in neither count from then on.
        executed: Per phase, token-layers that were computed. The masked-dense plan computes every
            layer for every token, so that this is what ran, not what the exits would allow.
        needed: Per phase, token-layers that the exits ask for: the sum of all tokens' depths.
        total: Per phase, token-layers without exits.
    """

    def __init__(self, exits: Sequence[int]) -> None:
        self.exits = tuple(exits)
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        with self._lock:
            self.seen = {phase: [0] * len(self.exits) for phase in PHASES}
            self.exited = {phase: [0] * len(self.exits) for phase in PHASES}
            self.executed = dict.fromkeys(PHASES, 0)
            self.needed = dict.fromkeys(PHASES, 0)
            self.total = dict.fromkeys(PHASES, 0)

    def add(
        self,
        phase: str,
        seen: Sequence[int],
        exited: Sequence[int],
        executed: int,
        needed: int,
        total: int,
    ) -> None:
        """Adds one forward."""
        with self._lock:
            for index in range(len(self.exits)):
                self.seen[phase][index] += seen[index]
                self.exited[phase][index] += exited[index]
            self.executed[phase] += executed
            self.needed[phase] += needed
            self.total[phase] += total

    @property
    def executed_token_layers(self) -> int:
        """Token-layers that were computed, in both phases."""
        return sum(self.executed.values())

    @property
    def needed_token_layers(self) -> int:
        """Token-layers that the exits ask for, in both phases."""
        return sum(self.needed.values())

    @property
    def total_token_layers(self) -> int:
        """Token-layers that the original model computes, in both phases."""
        return sum(self.total.values())

    @property
    def per_exit(self) -> list[dict[str, Any]]:
        """One entry per exit point: its layer, and per phase the tokens seen and exited."""
        return [
            {
                "exit": layer,
                **{
                    phase: {"seen": self.seen[phase][index], "exited": self.exited[phase][index]}
                    for phase in PHASES
                },
            }
            for index, layer in enumerate(self.exits)
        ]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """All counts by phase, for JSON."""
        return {
            phase: {
                "seen": list(self.seen[phase]),
                "exited": list(self.exited[phase]),
                "executed": self.executed[phase],
                "needed": self.needed[phase],
                "total": self.total[phase],
            }
            for phase in PHASES
        }

    def __repr__(self) -> str:
        share = self.executed_token_layers / max(self.total_token_layers, 1)
        return (
            f"Stats(executed {self.executed_token_layers} of {self.total_token_layers} "
            f"token-layers, {share:.1%}; exited {dict(self.exited)})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()
