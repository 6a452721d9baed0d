"""The masked-dense oracle: early exit by forward hooks on the original model's own layers.

Nothing here is shared with the rewriting. A token that leaves after ``e`` layers has its state
written back after each later layer, so those layers read the frozen state, and so do the keys,
values and recurrent states that they leave behind.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adept_fx.errors import UnsupportedModelError
from adept_fx.inspect_model import find_decoder
from adept_fx.model_facts import layer_count


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of a model's decoder: its first list of as many modules as it has layers.

    Raises:
        UnsupportedModelError: It has no such list.
    """
    decoder = find_decoder(model)
    count = layer_count(decoder)
    for module in decoder.modules():  # outer lists come first
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise UnsupportedModelError(f"{type(decoder).__name__} has no list of its {count} layers")


class Oracle:
    """Runs a model with given exits; the model is untouched between calls.

    Args:
        model: The original model.
        exits: Exit points.
    """

    def __init__(self, model: Any, exits: Sequence[int]) -> None:
        self.exits = tuple(exits)
        self.layers = decoder_layers(model)

    @contextmanager
    def leaving(self, wants: Tensor, real: Tensor) -> Iterator[None]:
        """For one forward inside.

        Args:
            wants: Which tokens leave at which exit, bool ``[exits, B, S]``.
            real: Tokens that are not padding, bool ``[B, S]``.
        """
        frozen = _Frozen(self.exits, wants & real)
        handles = [
            layer.register_forward_hook(_overwriter(frozen, count))
            for count, layer in enumerate(self.layers, 1)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Frozen:
    """The states of the tokens that have left in one forward."""

    def __init__(self, exits: tuple[int, ...], wants: Tensor) -> None:
        self.exits = exits
        self.wants = wants
        self.gone = torch.zeros_like(wants[0])
        self.state: Tensor | None = None

    def after(self, count: int, hidden: Tensor) -> Tensor:
        """What the layers behind layer ``count - 1`` are to read."""
        if self.state is not None:
            hidden = torch.where(_spread(self.gone, hidden), self.state, hidden)
        if count in self.exits:
            self.gone = self.gone | self.wants[self.exits.index(count)]
            self.state = hidden
        return hidden


def _spread(gone: Tensor, hidden: Tensor) -> Tensor:
    """``gone [B, S]`` over the axes of a state that may have streams before or behind them."""
    shape = tuple(hidden.shape)
    for at in range(hidden.ndim - 1):
        if shape[at : at + 2] == tuple(gone.shape):
            return gone.view(*(1,) * at, *gone.shape, *(1,) * (hidden.ndim - at - 2))
    raise UnsupportedModelError(f"a layer returns {shape}, which has no [batch, tokens] axes")


def _overwriter(frozen: _Frozen, count: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (frozen.after(count, output[0]), *output[1:])
        return frozen.after(count, output)

    return hook
