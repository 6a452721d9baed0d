"""A learned gate: a small network on what becomes of a few candidate tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adept_fx.gates.base import DRAFT_SIZE, Gate, GateInputs, check_finite, check_positive, readout


class DraftTokens(Gate):
    """Scores `sigmoid(w . relu(U x + c) + b)`, with `x` made of four candidates' logits.

    `x` holds their logits here, the probabilities among them, and how much those have changed since
    the exit point before: 12 numbers, so that the gate is small and the head computes four rows
    instead of the vocabulary. The predictor of Xu et al. 2025, "SpecEE: Accelerating Large Language
    Model Inference with Speculative Early Exiting", arXiv:2504.08850. There another model drafts
    the candidates; here they are the most likely tokens at the first exit point, which applies the
    whole head.

    As with `Linear`, the last layer starts at `w = 0` and `b = bias_init`.

    Attributes:
        hidden_weight: `U`, `[width, 12]`.
        hidden_bias: `c`, `[width]`.
        weight: `w`, `[width]`.
        bias: `b`, `[1]`.
    """

    needs = frozenset({"draft"})

    def __init__(
        self,
        width: int = 512,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bias_init: float = -6.0,
    ) -> None:
        """Makes an untrained gate.

        Args:
            width: Width of the hidden layer.
            device: Where the parameters live.
            dtype: Dtype of the parameters; the score is computed in float32 whatever it is.
            bias_init: The score of an untrained gate, before the sigmoid.

        Raises:
            ConfigError: If `width` or `bias_init` is no sensible number.
        """
        super().__init__()
        self.width = check_positive("width", width)
        self.bias_init = check_finite("bias_init", bias_init)
        self.hidden_weight = nn.Parameter(
            torch.empty(width, 3 * DRAFT_SIZE, device=device, dtype=dtype)
        )
        self.hidden_bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the parameters of an untrained gate."""
        nn.init.normal_(self.hidden_weight, std=(3 * DRAFT_SIZE) ** -0.5)
        nn.init.zeros_(self.hidden_bias)
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.bias_init)

    def forward(self, tokens: GateInputs) -> Tensor:
        """Scores the tokens from `draft` and `draft_previous`; returns float32 `[N]`."""
        logits = tokens.need("draft").float()
        share = torch.softmax(logits, dim=-1)
        change = share - torch.softmax(tokens.need("draft_previous").float(), dim=-1)
        features = torch.cat((logits, share, change), dim=-1)
        hidden = F.linear(features, self.hidden_weight.float(), self.hidden_bias.float())
        return readout(F.relu(hidden), self.weight, self.bias)
