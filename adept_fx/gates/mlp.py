"""A learned gate: a small network on the hidden state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adept_fx.gates.base import Gate, GateInputs, check_finite, check_positive, normalized, readout


class MLP(Gate):
    """Scores `sigmoid(w . gelu(U x + c) + b)`, with `x` the hidden state at root mean square 1.

    As with `Linear`, the last layer starts at `w = 0` and `b = bias_init`: untrained, the score is
    the same near-zero number for every hidden state, and the gradient reaches `w`.

    Attributes:
        hidden_weight: `U`, `[width, D]`.
        hidden_bias: `c`, `[width]`.
        weight: `w`, `[width]`.
        bias: `b`, `[1]`.
    """

    per_token = True

    def __init__(
        self,
        hidden_size: int,
        width: int = 64,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bias_init: float = -6.0,
    ) -> None:
        """Makes an untrained gate.

        Args:
            hidden_size: Width `D` of the residual stream.
            width: Width of the hidden layer.
            device: Where the parameters live.
            dtype: Dtype of the parameters; the score is computed in float32 whatever it is.
            bias_init: The score of an untrained gate, before the sigmoid.

        Raises:
            ConfigError: If a size or `bias_init` is no sensible number.
        """
        super().__init__()
        self.hidden_size = check_positive("hidden_size", hidden_size)
        self.width = check_positive("width", width)
        self.bias_init = check_finite("bias_init", bias_init)
        self.hidden_weight = nn.Parameter(
            torch.empty(width, hidden_size, device=device, dtype=dtype)
        )
        self.hidden_bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the parameters of an untrained gate."""
        # The input has a root mean square of 1, so this gives the hidden layer unit variance.
        nn.init.normal_(self.hidden_weight, std=self.hidden_size**-0.5)
        nn.init.zeros_(self.hidden_bias)
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.bias_init)

    def forward(self, tokens: GateInputs) -> Tensor:
        """Scores the tokens from `hidden`; returns float32 `[N]`."""
        features = F.linear(
            normalized(tokens.hidden), self.hidden_weight.float(), self.hidden_bias.float()
        )
        return readout(F.gelu(features), self.weight, self.bias)
