"""Builds what a gate is given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adept_fx.errors import InputError
from adept_fx.gates.base import FEATURES, Gate, GateInputs
from adept_fx.graph.symbols import TokenAxes
from adept_fx.runtime.rows import take

if TYPE_CHECKING:
    from adept_fx.runtime.run import Run
    from adept_fx.runtime.tokens import Tokens

_HIDDEN = TokenAxes(batch=0, token=1)
_HEADS = TokenAxes(batch=0, token=2)


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
    others: Mapping[str, Tensor] | None = None,
) -> GateInputs:
    """Inputs of a gate on packed tokens.

    Args:
        place: Where the gate is.
        needs: What it asks for.
        index: Positions ``b * S + s`` of the tokens, ``[N]``.
        hidden: Their states, ``[N, D]``.
        features: What it asks for of the graph, ``[N, ...]`` each, as :func:`wanted` orders it.
        others: What it asks for of the runtime, by name.
    """
    batch, tokens = place.grid.shape
    given: dict[str, Any] = {**dict(zip(wanted(needs), features, strict=True)), **(others or {})}
    return GateInputs(
        hidden=hidden,
        batch_index=torch.div(index, tokens, rounding_mode="floor"),
        token_index=index % tokens,
        exit_index=place.exit_index,
        phase=place.phase,
        num_exits=place.num_exits,
        batch_shape=(batch, tokens),
        **given,
    )


def collect(
    run: "Run",
    gate: Gate,
    tokens: "Tokens",
    exit_index: int,
    hidden: Tensor,
    features: Sequence[Tensor],
    live: Tensor | None,
    asked: Tensor | None = None,
) -> GateInputs:
    """Inputs of a gate on the live tokens of a layout.

    Args:
        run: The forward.
        gate: The gate.
        tokens: The layout.
        exit_index: The exit point.
        hidden: The states there, in the layout.
        features: What the gate asks for of the graph, in the layout.
        live: Positions ``b * S + s`` of the live tokens; None if all tokens of the call are.
        asked: Which of those the gate is asked about, by their numbers; None for all.
    """
    total = run.batch * run.tokens
    index = torch.arange(total, device=hidden.device) if live is None else live
    if asked is not None:
        index = index[asked]

    def pick(value: Tensor, axes: TokenAxes) -> Tensor:
        if tokens.index is None:
            value = take(value, axes, index, run.tokens)
        packed = value[0] if axes == _HIDDEN else value[0].transpose(0, 1)
        if tokens.index is None:
            return packed
        return packed[: tokens.count] if asked is None else packed[asked]

    whole = live is None and asked is None
    states = hidden.flatten(0, 1) if whole else pick(hidden, _HIDDEN)
    found = [
        pick(value, _HIDDEN if name == "previous" else _HEADS)
        for name, value in zip(wanted(gate.needs), features, strict=True)
    ]
    others: dict[str, Tensor] = {}
    if "logits" in gate.needs:
        others["logits"] = run.settings.logits(states, exit_index)
    if "position" in gate.needs:
        if run.positions is None:
            raise InputError("this forward was started for gates that ask for no position")
        others["position"] = run.positions.flatten()[index]
    if "draft" in gate.needs:
        head = partial(run.settings.logits, exit_index=exit_index)
        rows = partial(run.settings.draft, exit_index=exit_index)
        others |= run.drafts.of(index, total, states, head, rows, others.get("logits"))
    return gate_inputs(run.place(exit_index), gate.needs, index, states, found, others)
