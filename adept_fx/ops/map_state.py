"""``adept_fx::map_state``: the KV map in front of a layer, for tokens that have left.

Stands between a layer border behind an exit point and the layer, in front of nothing but the layer:
the residual stream itself goes past it. Only the masked-dense plan does the work; in the compacted
plan no token that has left is in the stage, and KV synthesis has a map of its own.

``down [E, W, r, D]`` and ``up [E, W, D, r]`` hold the maps of all exit points; ``which`` says which
of the ``W`` is this layer's, ``exits`` after how many layers each exit point lies.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

torch.library.define(
    "adept_fx::map_state",
    "(Tensor hidden, Tensor active, Tensor down, Tensor up, int which, int[] exits) -> Tensor",
)


@torch.library.register_fake("adept_fx::map_state")
def _(
    hidden: Tensor, active: Tensor, down: Tensor, up: Tensor, which: int, exits: list[int]
) -> Tensor:
    return torch.empty_like(hidden)


def left_at(depth: Tensor, exits: tuple[int, ...]) -> Tensor:
    """Whether a token of that depth ``[B, S]`` left at an exit point, ``[B, S, E]`` bool."""
    return torch.stack([depth == layers for layers in exits], dim=-1)


def mapped(hidden: Tensor, left_at: Tensor, down: Tensor, up: Tensor, which: int) -> Tensor:
    """States as the layer is to see them, all exit points in two products.

    Args:
        hidden: ``[B, S, D]``.
        left_at: Whether a token left at an exit point, ``[B, S, E]`` bool.
        down: ``[E, W, r, D]``.
        up: ``[E, W, D, r]``.
        which: Index into ``W``.
    """
    first, second = down[:, which].to(hidden.dtype), up[:, which].to(hidden.dtype)
    low = F.linear(hidden, first.flatten(0, 1)).unflatten(-1, first.shape[:2])
    low = low.masked_fill(~left_at.unsqueeze(-1), 0.0).flatten(-2)
    return hidden + F.linear(low, second.movedim(0, 1).flatten(1))
