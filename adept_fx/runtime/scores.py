"""Checks what a gate returned."""

import warnings

from torch import Tensor

from adept_fx.errors import GateError
from adept_fx.gates.base import Gate


def check_scores(scores: object, count: int, gate: Gate) -> Tensor:
    """Returns the scores, or says what is wrong with them.

    A token whose score is NaN never leaves; the first such score of a gate is warned about.

    Raises:
        GateError: Not a floating-point tensor of shape ``[N]``.
    """
    name = type(gate).__name__
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        kind = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise GateError(f"gate {name} returned {kind}, not a floating-point tensor")
    if scores.shape != (count,):
        raise GateError(
            f"gate {name} returned shape {tuple(scores.shape)} for {count} tokens",
            hint=f"Gate.forward must return one score per token, shape ({count},)",
        )
    # One look tells: a sum is NaN if one of its terms is (or if both infinities are among them).
    if not getattr(gate, "_warned_of_nan", False) and _odd(scores) and bool(scores.isnan().any()):
        gate._warned_of_nan = True  # type: ignore[assignment]
        warnings.warn(
            f"gate {name} returned NaN; tokens with such a score never leave",
            RuntimeWarning,
            stacklevel=2,
        )
    return scores


def _odd(scores: Tensor) -> bool:
    total = float(scores.detach().sum())
    return total != total
