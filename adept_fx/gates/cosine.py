"""Saturation gate: how little the last layer changed the state."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from adept_fx.gates.base import Gate, GateInputs


class Cosine(Gate):
    """Scores the cosine of the state at the exit and the state one layer earlier, cut to `[0, 1]`.

    The hidden-state saturation of Schuster et al. 2022, "Confident Adaptive Language Modeling"
    (CALM), arXiv:2207.07061, and of Tang et al. 2023, "You Need Multiple Exiting: Dynamic Early
    Exiting for Accelerating Unified Vision Language Model" (MuE), arXiv:2211.11152.
    """

    needs = frozenset({"previous"})
    per_token = True

    def forward(self, tokens: GateInputs) -> Tensor:
        """Scores the tokens from `hidden` and `previous`; returns float32 `[N]`."""
        previous = tokens.need("previous").float()
        return F.cosine_similarity(tokens.hidden.float(), previous, dim=-1).clamp(0.0, 1.0)
