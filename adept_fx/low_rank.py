"""Low-rank residual maps: the learned parts of an exit besides its gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExitAdapter(nn.Module):
    """``x + up(down(x))``: between the state that a token left with, and the final norm.

    The identity when new: ``up`` starts at zero. It is linear, as the "tuned lens" is (Belrose et
    al. 2023, arXiv:2303.08112), so that the scale of a residual stream, which differs by orders of
    magnitude between models and depths, does not matter. Parameters are plain tensors, not linear
    layers, so that tools which rewrite those (adapters, quantizers) leave them alone.

    Args:
        hidden_size: Width ``D`` of the residual stream.
        rank: Rank ``r`` of the map.
        device: Where the parameters live.
        dtype: Of the parameters; the map is computed in the dtype of its input.

    Attributes:
        down: ``[r, D]``.
        up: ``[D, r]``.
    """

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, hidden_size, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(hidden_size, rank, device=device, dtype=dtype))
        nn.init.normal_(self.down, std=hidden_size**-0.5)
        nn.init.zeros_(self.up)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps ``hidden [..., D]``."""
        low = F.linear(hidden, self.down.to(hidden.dtype))
        return hidden + F.linear(low, self.up.to(hidden.dtype))


class KVMaps(nn.Module):
    """``m_{e,l}``: between the state that a token left with, and a skipped layer's projections.

    ``x + up[e, l] down[e, l] x``, the identity when new: a learned correction of what the skipped
    layers would have added to the state (ADEPT, arXiv:2601.03700, maps states, too).

    Args:
        hidden_size: Width ``D`` of the residual stream.
        rank: Rank ``r`` of the maps.
        exits: Number of exit points ``E``.
        layers: Number of maps per exit ``W``: one for all skipped layers, or one for each layer
            behind the first exit point.
        device: Where the parameters live.
        dtype: Of the parameters.

    Attributes:
        down: ``[E, W, r, D]``.
        up: ``[E, W, D, r]``.
    """

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        exits: int,
        layers: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (exits, layers, rank, hidden_size)
        self.down = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(*shape[:2], *shape[:1:-1], device=device, dtype=dtype))
        nn.init.normal_(self.down, std=hidden_size**-0.5)
        nn.init.zeros_(self.up)
