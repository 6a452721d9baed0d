"""A learned gate: one linear map of the hidden state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adept_fx.gates.base import Gate, GateInputs, check_finite, check_positive, normalized, readout


class Linear(Gate):
    """Scores `sigmoid(w . x + b)`, where `x` is the hidden state scaled to a root mean square of 1.

    Freshly made, `w` is 0 and `b` is `bias_init`: the score is the same near-zero number for every
    hidden state, so an untrained gate lets nothing leave at any sensible threshold, and yet the
    gradient reaches `w`. Parameters are plain tensors, not an `nn.Linear`, so that tools which
    rewrite every linear layer of a model (adapters, quantizers) leave the gate alone.

    Attributes:
        weight: `[D]`.
        bias: `[1]`.
    """

    per_token = True

    def __init__(
        self,
        hidden_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bias_init: float = -6.0,
    ) -> None:
        """Makes an untrained gate.

        Args:
            hidden_size: Width `D` of the residual stream.
            device: Where the parameters live.
            dtype: Dtype of the parameters; the score is computed in float32 whatever it is.
            bias_init: The score of an untrained gate, before the sigmoid.

        Raises:
            ConfigError: If `hidden_size` or `bias_init` is no sensible number.
        """
        super().__init__()
        self.hidden_size = check_positive("hidden_size", hidden_size)
        self.bias_init = check_finite("bias_init", bias_init)
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the parameters of an untrained gate."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.bias_init)

    def forward(self, tokens: GateInputs) -> Tensor:
        """Scores the tokens from `hidden`; returns float32 `[N]`."""
        return readout(normalized(tokens.hidden), self.weight, self.bias)
