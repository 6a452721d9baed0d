"""What a gate is given and what it must return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adept_fx.errors import ConfigError, GateError

FEATURES = ("previous", "query", "key", "value")
"""What a gate may be given of the layers before it, in this order."""

NEEDS = (*FEATURES, "logits", "position", "draft")
"""What a gate may ask for in `Gate.needs`."""

DRAFT_SIZE = 4
"""How many candidates for the next token a gate that asks for `"draft"` is given."""


_OPTIONAL = (*NEEDS, "draft_previous", "draft_tokens")


# eq=False: comparing tensors field by field has no truth value.
@dataclass(frozen=True, slots=True, eq=False)
class GateInputs:
    """What a gate sees of the tokens that are still active at its exit point.

    `N` is the number of those tokens (may be 0), `D` the hidden size, `V` the vocabulary. Tensors
    are on the model's device; floating ones have the model's dtype, indices are int64.

    Attributes:
        hidden: `[N, D]`, the residual stream at the exit point.
        batch_index: `[N]`, the row of each token.
        token_index: `[N]`, the column of each token in this forward's input.
        exit_index: Which exit point this is, counted from 0.
        phase: `"prefill"` (more than one new token per row) or `"decode"`.
        num_exits: Number of exit points.
        batch_shape: `(B, S)`, rows and columns of this forward's input.
        previous: `[N, D]`, the residual stream one layer earlier.
        query: `[N, heads, head_dim]`, of the last layer run.
        key: `[N, kv_heads, head_dim]`, of the last layer run.
        value: `[N, kv_heads, value_dim]`, of the last layer run.
        logits: `[N, V]`, what the token would emit if it left here.
        position: `[N]`, the place of each token in its row, cached tokens counted and padding not:
            the call's `position_ids`, or the number of real tokens before it.
        draft: `[N, DRAFT_SIZE]`, the logits of a few candidates for the next token if the token
            left here. The candidates are those that were most likely at the first exit point
            whose gate asks for them, in that order; there alone the whole head is applied.
        draft_previous: `[N, DRAFT_SIZE]`, the same at the exit point before this one whose gate
            asks for them; equal to `draft` at the first.
        draft_tokens: `[N, DRAFT_SIZE]`, which candidates these are: entries of the vocabulary.

    From `previous` on they are None unless `Gate.needs` names them; `"draft"` stands for the last
    three.
    """

    hidden: Tensor
    batch_index: Tensor
    token_index: Tensor
    exit_index: int
    phase: str
    num_exits: int
    batch_shape: tuple[int, int]
    previous: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    logits: Tensor | None = None
    position: Tensor | None = None
    draft: Tensor | None = None
    draft_previous: Tensor | None = None
    draft_tokens: Tensor | None = None

    def need(self, name: str) -> Tensor:
        """Returns an optional tensor that must be there.

        Args:
            name: One of the names that `Gate.needs` may hold, or a field that comes with one.

        Returns:
            The tensor.

        Raises:
            GateError: If it was not supplied.
        """
        value = getattr(self, name) if name in _OPTIONAL else None
        if not isinstance(value, Tensor):
            raise GateError(
                f"the gate of exit {self.exit_index} reads {name!r}, which it was not given",
                hint=f"name it in the gate's `needs`; known: {', '.join(NEEDS)}",
            )
        return value


class Gate(nn.Module):
    """Scores tokens: how sure is it that this token may leave here?

    A subclass implements `forward`. It must accept `N = 0`, and the score of a token must not
    depend on the other tokens. A token leaves iff its score is strictly above the threshold.

    Attributes:
        needs: Which optional fields of `GateInputs` `forward` reads.
        keeps_python_state: True if `forward` reads or writes Python state that changes from call
            to call; such a gate runs outside compiled regions.
        per_token: True if `forward` treats every token alike and by itself. A compiled stage then
            computes it along with its layers, for padding and for tokens that have left, too;
            those scores are not read.
    """

    needs: frozenset[str] = frozenset()
    keeps_python_state: bool = False
    per_token: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Checks `needs` where the class is written."""
        super().__init_subclass__(**kwargs)
        # A property decides per instance; `build_gates` checks what it returns.
        if not isinstance(cls.__dict__.get("needs"), property):
            cls.needs = check_needs(cls.needs, cls.__name__)
        if "forward" in cls.__dict__ and "per_token" not in cls.__dict__:
            cls.per_token = False  # another forward makes its own promise

    def set_sizes(self, sizes: Mapping[str, int]) -> None:
        """Tells the gate how wide its input is in the model; here it does nothing.

        `transform` and `set_gates` call it before the gate is asked for the first time, once per
        exit point that it serves. A gate whose parameters depend on more than the hidden size makes
        them here.

        Args:
            sizes: Numbers per token of `hidden`, and of each feature that the gate needs.

        Raises:
            ConfigError: If the gate was made for other sizes.
        """

    def forward(self, tokens: GateInputs) -> Tensor:
        """Scores the tokens.

        Args:
            tokens: The tokens that are still active.

        Returns:
            `[N]`, floating, in `[0, 1]`; NaN never exits.

        Raises:
            NotImplementedError: In the base class.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement forward(tokens)")


def check_needs(needs: object, owner: str) -> frozenset[str]:
    """Checks what a gate asks for.

    Args:
        needs: The value of `Gate.needs`.
        owner: The gate's class name, for the message.

    Returns:
        `needs` as a frozenset.

    Raises:
        ConfigError: If it is no set of known names.
    """
    if not isinstance(needs, (set, frozenset)):
        raise ConfigError(
            f"{owner}.needs must be a set of names, not {needs!r}",
            hint='for example: needs = frozenset({"logits"})',
        )
    unknown = sorted(repr(name) for name in needs if name not in NEEDS)
    if unknown:
        raise ConfigError(
            f"{owner}.needs names {', '.join(unknown)}, which no gate can be given",
            hint=f"known: {', '.join(NEEDS)}",
        )
    return frozenset(needs)


def normalized(hidden: Tensor) -> Tensor:
    """Returns `hidden` in float32 with a root mean square of 1 per token.

    The norm of a residual stream differs by orders of magnitude between models and depths. Without
    parameters of its own this keeps the scores sane on any of them.
    """
    # The eps only guards the zero vector: a usual one would matter for models of small scale.
    return F.rms_norm(hidden.float(), (hidden.shape[-1],), eps=1e-30)


def readout(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The score of a learned gate, `sigmoid(w . features + b)`, in float32.

    Args:
        features: `[N, width]`.
        weight: `w`, `[width]`.
        bias: `b`, `[1]`.
    """
    # Product and sum instead of a matmul: autocast would run a matmul in half precision.
    return torch.sigmoid((features.float() * weight.float()).sum(-1) + bias.float())


def probabilities(tokens: GateInputs) -> Tensor:
    """Returns the softmax of the early logits, `[N, V]` in float32.

    Raises:
        GateError: If the head emits fewer than two classes, which leaves nothing to be sure of.
    """
    logits = tokens.need("logits")
    if logits.shape[-1] < 2:
        raise GateError(
            f"a gate on logits needs at least 2 classes; the model emits {logits.shape[-1]}",
            hint='for a regression head use gate="mlp", "linear" or "cosine"',
        )
    return torch.softmax(logits.float(), dim=-1)


def check_positive(name: str, value: object) -> int:
    """Returns `value` if it is an int of at least 1, else raises `ConfigError` naming `name`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
    return value


def check_finite(name: str, value: object) -> float:
    """Returns `value` as a finite float, else raises `ConfigError` naming `name`."""
    # Chained comparison: false for NaN, and exact for ints too large for a float.
    largest = torch.finfo(torch.float32).max
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not -largest <= value <= largest:  # type: ignore[operator]
        raise ConfigError(f"{name} must be a finite number, not {value!r}")
    return float(value)  # type: ignore[arg-type]
