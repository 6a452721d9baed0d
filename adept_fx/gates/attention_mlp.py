"""A learned gate: a small network on the hidden state and the attention of the last layer run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adept_fx.errors import ConfigError, GateError
from adept_fx.gates.base import Gate, GateInputs, check_finite, check_positive, normalized, readout

_READ = ("hidden", "query", "key", "value")


class AttentionMLP(Gate):
    """Scores `sigmoid(w . gelu(U x + c) + b)`, with `x` the hidden state, query, key and value.

    Each of the four is flattened and scaled to a root mean square of 1. The state that the gate of
    Yoo et al. 2026, "ADEPT: Adaptive Dynamic Early-Exit Process for Transformers",
    arXiv:2601.03700, decides on: hidden state, query, key and value of the last layer run.

    `U` is kept in four parts, one per input, so that a state dict tells their sizes. Those of
    query, key and value follow from the model: `transform` and `set_gates` read them off its graph
    and make the parameters, unless the gate was given them. As with `Linear`, the last layer starts
    at `w = 0` and `b = bias_init`.

    Attributes:
        hidden_weight: Part of `U`, `[width, D]`.
        query_weight: Part of `U`, `[width, query_size]`; None until the size is known.
        key_weight: Part of `U`, `[width, key_size]`; None until the size is known.
        value_weight: Part of `U`, `[width, value_size]`; None until the size is known.
        hidden_bias: `c`, `[width]`.
        weight: `w`, `[width]`.
        bias: `b`, `[1]`.
    """

    needs = frozenset({"query", "key", "value"})
    per_token = True
    query_weight: nn.Parameter | None
    key_weight: nn.Parameter | None
    value_weight: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        query_size: int | None = None,
        key_size: int | None = None,
        value_size: int | None = None,
        width: int = 64,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bias_init: float = -6.0,
    ) -> None:
        """Makes an untrained gate.

        Args:
            hidden_size: Width `D` of the residual stream.
            query_size: Numbers in a token's query, all heads together. All three sizes are given,
                or none: the model then tells.
            key_size: Numbers in a token's key.
            value_size: Numbers in a token's value.
            width: Width of the hidden layer.
            device: Where the parameters live.
            dtype: Dtype of the parameters; the score is computed in float32 whatever it is.
            bias_init: The score of an untrained gate, before the sigmoid.

        Raises:
            ConfigError: If a size or `bias_init` is no sensible number, or some sizes are missing.
        """
        super().__init__()
        self.hidden_size = check_positive("hidden_size", hidden_size)
        self.query_size: int | None = None
        self.key_size: int | None = None
        self.value_size: int | None = None
        self.width = check_positive("width", width)
        self.bias_init = check_finite("bias_init", bias_init)
        self.hidden_weight = nn.Parameter(
            torch.empty(width, hidden_size, device=device, dtype=dtype)
        )
        for name in _READ[1:]:
            self.register_parameter(f"{name}_weight", None)
        self.hidden_bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        given = {"query": query_size, "key": key_size, "value": value_size}
        known = {name: size for name, size in given.items() if size is not None}
        if known:
            if len(known) < len(given):
                raise ConfigError(
                    f"{sorted(known)} of {sorted(given)} have a size",
                    hint="give all three, or none: then transform sets them",
                )
            self.set_sizes({"hidden": hidden_size, **known})
        else:
            self.reset_parameters()

    def set_sizes(self, sizes: Mapping[str, int]) -> None:
        """Makes the parameters that depend on the model, if they are not there yet.

        Args:
            sizes: Of `hidden`, `query`, `key` and `value`, each in numbers per token.

        Raises:
            ConfigError: If the gate was made for other sizes.
        """
        own = {name: getattr(self, f"{name}_size") for name in _READ}
        wrong = [name for name in _READ if own[name] not in (None, sizes[name])]
        if wrong:
            raise ConfigError(
                f"gate AttentionMLP was made for a {wrong[0]} of size {own[wrong[0]]}; the model "
                f"has one of size {sizes[wrong[0]]} at an exit point that this gate serves",
                hint='give its name, "attention_mlp", or one gate per exit: each gets its own '
                "sizes",
            )
        if self.query_size is not None:
            return
        like = self.hidden_bias
        for name in _READ[1:]:
            setattr(self, f"{name}_size", check_positive(f"{name}_size", sizes[name]))
            weight = torch.empty(self.width, sizes[name], device=like.device, dtype=like.dtype)
            made = nn.Parameter(weight, requires_grad=like.requires_grad)
            self.register_parameter(f"{name}_weight", made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the parameters of an untrained gate."""
        parts = [getattr(self, f"{name}_weight") for name in _READ]
        known = [part for part in parts if part is not None]
        total = sum(part.shape[1] for part in known)
        for part in known:
            # Each input has a root mean square of 1: the hidden layer gets unit variance.
            nn.init.normal_(part, std=total**-0.5)
        nn.init.zeros_(self.hidden_bias)
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.bias_init)

    def forward(self, tokens: GateInputs) -> Tensor:
        """Scores the tokens from `hidden`, `query`, `key` and `value`; returns float32 `[N]`.

        Raises:
            GateError: If the gate has no sizes yet.
        """
        if self.query_weight is None or self.key_weight is None or self.value_weight is None:
            raise GateError(
                "this AttentionMLP does not know the sizes of query, key and value yet",
                hint="transform and set_gates set them; or give query_size, key_size, value_size",
            )
        features = F.linear(
            normalized(tokens.hidden), self.hidden_weight.float(), self.hidden_bias.float()
        )
        features = features + _part(tokens.need("query"), self.query_weight)
        features = features + _part(tokens.need("key"), self.key_weight)
        features = features + _part(tokens.need("value"), self.value_weight)
        return readout(F.gelu(features), self.weight, self.bias)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Loads a state dict; a gate without sizes takes those that it was saved with."""
        parts = {name: state.get(f"{prefix}{name}_weight") for name in _READ}
        shapes = {name: part.shape for name, part in parts.items() if isinstance(part, Tensor)}
        whole = len(shapes) == len(parts) and all(len(shape) == 2 for shape in shapes.values())
        if self.query_size is None and whole and shapes["hidden"][1] == self.hidden_size:
            self.set_sizes({name: shape[1] for name, shape in shapes.items()})
        super()._load_from_state_dict(state, prefix, *rest)


def _part(value: Tensor, weight: Tensor) -> Tensor:
    """What one input `[N, heads, dim]` adds to the hidden layer."""
    return F.linear(normalized(value.flatten(1)), weight.float())
