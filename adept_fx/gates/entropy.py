"""Confidence gate: how concentrated the distribution is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adept_fx.gates.base import Gate, GateInputs, probabilities


class Entropy(Gate):
    """Scores `1 - H / log V`, with `H` the entropy of what the token would emit if it left here.

    0 for a uniform distribution, 1 for a certain one. The criterion of Xin et al. 2020, "DeeBERT:
    Dynamic Early Exiting for Accelerating BERT Inference", arXiv:2004.12993; for language models
    also Valade 2024, "Accelerating Large Language Model Inference with Self-Supervised Early
    Exits", arXiv:2407.21082. Both leave where the entropy is *low*; here a score is high instead.
    """

    needs = frozenset({"logits"})

    def forward(self, tokens: GateInputs) -> Tensor:
        """Scores the tokens from `logits`; returns float32 `[N]`."""
        probs = probabilities(tokens)
        # entr(0) is 0, where p * log(p) would be NaN; the clamp only removes rounding.
        entropy: Tensor = torch.special.entr(probs).sum(-1)
        return (1.0 - entropy / math.log(probs.shape[-1])).clamp(0.0, 1.0)
