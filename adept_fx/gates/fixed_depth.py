"""A gate that does not look: every token leaves at one depth."""

from __future__ import annotations

import torch
from torch import Tensor

from adept_fx.errors import ConfigError
from adept_fx.gates.base import Gate, GateInputs


class FixedDepth(Gate):
    """Scores 1 at the exit with index `exit_index` and at all later ones, 0 before.

    So every token leaves at that exit whenever its threshold is below 1. The model it makes is the
    one with the layers behind that exit removed: a baseline, and a draft model. An index past the
    last exit lets nothing leave.
    """

    def __init__(self, exit_index: int = 0) -> None:
        """Makes the gate.

        Args:
            exit_index: Index of the exit point (not of the layer), counted from 0.

        Raises:
            ConfigError: If it is no whole number of at least 0.
        """
        super().__init__()
        if isinstance(exit_index, bool) or not isinstance(exit_index, int) or exit_index < 0:
            raise ConfigError(
                f"exit_index must be a whole number of at least 0, not {exit_index!r}",
                hint="it counts exit points, not layers: 0 is the first exit point",
            )
        self.exit_index = exit_index

    def forward(self, tokens: GateInputs) -> Tensor:
        """Scores all tokens alike; returns float32 `[N]`."""
        score = 1.0 if tokens.exit_index >= self.exit_index else 0.0
        return tokens.hidden.new_full((tokens.hidden.shape[0],), score, dtype=torch.float32)
