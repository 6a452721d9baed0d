"""Builds what a gate is given."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adept_fx.gates.base import FEATURES, GateInputs


@dataclass(frozen=True, eq=False)
class Place:
    """Where a gate is in a forward.

    Attributes:
        grid: Layers run per token so far as is known, ``[B, S]``.
        exit_index: The exit point.
        num_exits: Number of exit points.
        phase: ``"prefill"`` or ``"decode"``.
    """

    grid: Tensor
    exit_index: int
    num_exits: int
    phase: str


def wanted(needs: frozenset[str]) -> list[str]:
    """The features that a gate asks for, in the order in which a stage returns them."""
    return [name for name in FEATURES if name in needs]


def gate_inputs(
    place: Place,
    needs: frozenset[str],
    index: Tensor,
    hidden: Tensor,
    features: Sequence[Tensor],
    logits: Tensor | None = None,
) -> GateInputs:
    """Inputs of a gate on packed tokens.

    Args:
        place: Where the gate is.
        needs: What it asks for.
        index: Positions ``b * S + s`` of the tokens, ``[N]``.
        hidden: Their states, ``[N, D]``.
        features: What else it asks for but logits, ``[N, ...]`` each, as :func:`wanted` orders it.
        logits: ``[N, V]``, if it asks for them.
    """
    batch, tokens = place.grid.shape
    return GateInputs(
        hidden=hidden,
        batch_index=torch.div(index, tokens, rounding_mode="floor"),
        token_index=index % tokens,
        exit_index=place.exit_index,
        phase=place.phase,
        num_exits=place.num_exits,
        batch_shape=(batch, tokens),
        logits=logits,
        **dict(zip(wanted(needs), features, strict=True)),
    )
