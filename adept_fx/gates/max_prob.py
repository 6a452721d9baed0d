"""Confidence gate: the largest probability."""

from __future__ import annotations

from torch import Tensor

from adept_fx.gates.base import Gate, GateInputs, probabilities


class MaxProb(Gate):
    """Scores the probability of the most likely token, if the token left here.

    The confidence by which Schwartz et al. 2020 leave a classifier early: "The Right Tool for the
    Job: Matching Model and Instance Complexities", arXiv:2004.07453.
    """

    needs = frozenset({"logits"})

    def forward(self, tokens: GateInputs) -> Tensor:
        """Scores the tokens from `logits`; returns float32 `[N]` in `[1 / V, 1]`."""
        return probabilities(tokens).amax(dim=-1)
