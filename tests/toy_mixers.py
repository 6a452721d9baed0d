"""A Llama decoder, some of whose layers keep a convolution state instead of keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from toys import Layer, Toy

KINDS = ("conv", "full_attention", "conv")


class Shift(nn.Module):
    """Adds the token before, which it keeps in the cache."""

    def __init__(self, width: int, at: int) -> None:
        super().__init__()
        self.at, self.mix = at, nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor, cache: Any = None) -> Tensor:
        mixed: Tensor = self.mix(hidden)
        before = mixed.transpose(1, 2)
        if cache is not None:
            before = cache.update_conv_state(before, self.at)
        before = nn.functional.pad(before, (1, 0))[..., -mixed.shape[1] - 1 : -1]
        return mixed + before.transpose(1, 2)


class Outer(nn.Module):
    """Hands the cache on, and asks it for nothing."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor, cache: Any = None) -> Tensor:
        found: Tensor = self.inner(2 * hidden, cache=cache)
        return found


class ShiftLayer(Layer):
    """Shifts in some layers, attends in the others."""

    made: type[nn.Module] = Shift

    def __init__(self, config: Any, at: int) -> None:
        super().__init__(config, at)
        self.shift = Outer(self.made(config.hidden_size, at)) if KINDS[at] == "conv" else None

    def forward(  # type: ignore[override]
        self, hidden: Tensor, carried: Tensor | None, **common: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.shift is None:
            return super().forward(hidden, carried, **common)
        return hidden + self.shift(hidden, cache=common["past_key_values"]), carried


class Shifting(Toy):
    layer_class = ShiftLayer
    kinds = KINDS
