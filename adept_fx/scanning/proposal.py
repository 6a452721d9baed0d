"""Which exit points save most at a wanted agreement."""

from dataclasses import dataclass

import torch
from torch import Tensor

_MOST = 3
_THRESHOLDS = 64
# Another exit point has to save so much more: its gate costs something.
_WORTHWHILE = 0.005


@dataclass(frozen=True)
class Proposal:
    """Exit points for a wanted agreement.

    Attributes:
        target: Share of the tokens that are to agree with the whole model.
        exits: Exit points; none if nothing is saved.
        threshold: Of the largest probability, the same at all exit points; 1.0 if nothing is saved.
        saved: Share of the token-layers that are not run.
        agreement: Share of these tokens that agree.
    """

    target: float
    exits: tuple[int, ...]
    threshold: float
    saved: float
    agreement: float


def propose(
    agrees: Tensor, confidence: Tensor, exits: tuple[int, ...], num_layers: int, target: float
) -> Proposal:
    """Adds exit points one by one, always the one that saves most.

    The same tokens choose and are judged, and what exits change about later tokens' keys is not in
    it: a first estimate, no promise.

    Args:
        agrees: ``[E, N]`` bool.
        confidence: ``[E, N]``.
        exits: The exit point behind each of the ``E`` rows.
        num_layers: Layers of the model.
        target: The wanted agreement.
    """
    best = Proposal(target, (), 1.0, 0.0, 1.0)
    chosen: list[int] = []
    while len(chosen) < min(_MOST, len(exits)):
        found = [
            _evaluate(agrees, confidence, sorted([*chosen, row]), exits, num_layers, target)
            for row in range(len(exits))
            if row not in chosen
        ]
        step = max(found, key=lambda item: item.saved)
        if step.saved < best.saved + _WORTHWHILE:
            break
        best, chosen = step, [exits.index(layer) for layer in step.exits]
    return best


def _evaluate(
    agrees: Tensor,
    confidence: Tensor,
    rows: list[int],
    exits: tuple[int, ...],
    num_layers: int,
    target: float,
) -> Proposal:
    """The lowest threshold that keeps the target saves most."""
    sure, right = confidence[rows], agrees[rows]
    skipped = torch.tensor([(num_layers - exits[row]) / num_layers for row in rows])
    levels = torch.linspace(0.0, 1.0, _THRESHOLDS + 1, dtype=torch.float64)
    found = Proposal(target, (), 1.0, 0.0, 1.0)
    for threshold in sorted({float(x) for x in sure.flatten().double().quantile(levels)}):
        leaves = sure > threshold
        first = leaves.int().argmax(0)
        gone = leaves.any(0)
        kept = torch.where(gone, right.gather(0, first[None])[0], True).double().mean()
        if kept >= target:
            saved = float((skipped[first] * gone).mean())
            exits_of = tuple(exits[row] for row in rows)
            return Proposal(target, exits_of, threshold, saved, float(kept)) if saved else found
    return found
