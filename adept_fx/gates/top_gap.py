"""Confidence gate: how far the best token is ahead of the second."""

from __future__ import annotations

from torch import Tensor

from adept_fx.gates.base import Gate, GateInputs, probabilities


class TopGap(Gate):
    """Scores the difference of the two largest probabilities, if the token left here.

    The softmax measure of Schuster et al. 2022, "Confident Adaptive Language Modeling" (CALM),
    arXiv:2207.07061, also used by Bae et al. 2023, "Fast and Robust Early-Exiting Framework for
    Autoregressive Language Models with Synchronized Parallel Decoding" (FREE), arXiv:2310.05424.
    """

    needs = frozenset({"logits"})

    def forward(self, tokens: GateInputs) -> Tensor:
        """Scores the tokens from `logits`; returns float32 `[N]`."""
        best = probabilities(tokens).topk(2, dim=-1).values
        return best[:, 0] - best[:, 1]
