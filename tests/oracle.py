"""The masked-dense oracle: early exit by forward hooks on the original model's own layers.

Nothing here is shared with the product. A token that leaves after `e` layers has its state
written back after each later layer, so those layers read the frozen state, and so do the keys
and values that they cache: design section 2, word for word.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

FP32_TOLERANCE = 1e-5
BF16_ROUNDING = 2.0**-8  # the largest relative error of one rounding to bfloat16


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The one ModuleList of `num_hidden_layers` modules under the decoder."""
    count = model.get_decoder().config.num_hidden_layers
    found = [
        module
        for module in model.get_decoder().children()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    found = found or [
        module
        for module in model.get_decoder().modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    assert len(found) == 1, f"{type(model).__name__}: {len(found)} lists of {count} layers"
    return found[0]


class Exits:
    """One forward's exits: who has left, with which state, after how many layers."""

    def __init__(self, exits: Sequence[int], wants: Tensor, real: Tensor, layers: int) -> None:
        assert wants.shape == (len(exits), *real.shape), (wants.shape, real.shape)
        self.exits, self.wants, self.real = tuple(exits), wants, real
        self.depth = torch.where(real, layers, 0)
        self.gone = torch.zeros_like(real)
        self.state: Tensor | None = None
        self.ran = 0

    def after(self, count: int, hidden: Tensor) -> Tensor | None:
        """What replaces the output of layer `count - 1`; None leaves it alone."""
        assert count == self.ran + 1, f"layer {count - 1} ran after {self.ran} layers"
        self.ran = count
        if count in self.exits:
            self._leave(count, hidden)
        if self.state is None:
            return None
        return torch.where(self.gone[..., None], self.state, hidden)

    def _leave(self, count: int, hidden: Tensor) -> None:
        new = self.wants[self.exits.index(count)] & self.real & ~self.gone
        if not new.any():
            return
        old = hidden if self.state is None else self.state
        self.state = torch.where(new[..., None], hidden, old)
        self.gone = self.gone | new
        self.depth = torch.where(new, count, self.depth)


class Oracle:
    """Runs `model`, which it leaves untouched between calls, with exits after `exits` layers."""

    def __init__(self, model: PreTrainedModel, exits: Sequence[int]) -> None:
        self.model, self.exits = model, tuple(exits)
        self.layers = decoder_layers(model)
        assert all(1 <= e < len(self.layers) for e in self.exits), self.exits

    @contextmanager
    def exits_for(self, wants: Tensor, real: Tensor) -> Iterator[Exits]:
        """For one forward inside; `wants` is bool [exits, B, S], `real` bool [B, S]."""
        exits = Exits(self.exits, wants, real, len(self.layers))
        handles = [
            layer.register_forward_hook(_overwriter(exits, index + 1))
            for index, layer in enumerate(self.layers)
        ]
        try:
            yield exits
            assert exits.ran == len(self.layers), f"{exits.ran} layers ran: one forward, please"
        finally:
            for handle in handles:
                handle.remove()


def _overwriter(exits: Exits, count: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        replaced = exits.after(count, hidden)
        if replaced is None:
            return None
        return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

    return hook


def depths(wants: Tensor, exits: Sequence[int], layers: int, real: Tensor) -> Tensor:
    """Layers run per token, without any model: [B, S], `layers` if none is skipped, 0 for pads."""
    depth = torch.full_like(real, layers, dtype=torch.long)
    for count, want in reversed(list(zip(exits, wants, strict=True))):
        depth = torch.where(want, count, depth)
    return torch.where(real, depth, 0)


def cut(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """A copy of `model` that ends after `count` layers, with the same norm and head."""
    short = copy.deepcopy(model)
    del decoder_layers(short)[count:]
    for config in {id(c): c for c in (short.config, short.get_decoder().config)}.values():
        config.num_hidden_layers = count
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:count]
    return short


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights, in float32: what rounding errors are measured against."""
    return copy.deepcopy(model).float()


# --- comparison ---------------------------------------------------------------------------------


def assert_same(got: Tensor, want: Tensor, what: str) -> None:
    """Bit for bit (a zero's sign aside)."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{what}: {got.dtype}, not {want.dtype}"
    assert torch.isfinite(got).all(), f"{what}: not finite"
    assert torch.equal(got, want), f"{what}: not bitwise equal, off by {_error(got, want):.3g}"


def assert_close(got: Tensor, want: Tensor, what: str, truth: Tensor | None = None) -> None:
    """Within design section 2: fp32 without `truth`; else `truth` is the fp32 oracle's value.

    A lower precision may err twice as much as the original does, whose own error counts as at
    least one rounding of the largest value (a tensor of few values may be right by luck).
    """
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{what}: {got.dtype}, not {want.dtype}"
    assert torch.isfinite(got).all(), f"{what}: not finite"
    if got.numel() == 0:
        return
    reference = want if truth is None else truth
    size, error = reference.abs().max().item(), _error(got, reference)
    allowed = FP32_TOLERANCE * size
    if truth is not None:
        allowed = 2 * max(_error(want, truth), BF16_ROUNDING * size)
    assert error <= allowed, f"{what}: off by {error:.3g}, allowed {allowed:.3g}, size {size:.3g}"


def _error(got: Tensor, want: Tensor) -> float:
    return (got.double() - want.double()).abs().max().item() if got.numel() else 0.0


def visible_cache(cache: Any, layer: int, real: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per row, keys and values [H, n, d] that `layer` holds of the row's real tokens.

    `real` is bool [B, columns seen so far]. A layer that holds fewer columns than were seen
    (a window) holds the last ones; one that has more room (static) holds them first.
    """
    keys, values = cache.layers[layer].keys, cache.layers[layer].values
    assert keys.shape[-2] == values.shape[-2]
    return list(zip(_visible(keys, real), _visible(values, real), strict=True))


def _visible(value: Tensor, real: Tensor) -> list[Tensor]:
    """Per row, the entries [..., n, d] of real tokens, of `value` [B, ..., columns, d]."""
    seen = real.shape[1]
    value = value[..., :seen, :]
    held = real[:, seen - value.shape[-2] :]
    return [value[row][..., held[row], :] for row in range(real.shape[0])]


def held(cache: Any, layer: int, real: Tensor) -> dict[str, Tensor]:
    """All that a layer keeps of its rows' real tokens, by name.

    Keys, values and index keys of all rows in a row; states whole: one per row, they depend on no
    padding.
    """
    kept = cache.layers[layer]
    found: dict[str, Tensor] = {}
    for name in ("keys", "values", "indexer_keys"):
        value = getattr(kept, name, None)
        if value is not None and value.numel():
            found[name] = torch.cat(_visible(value, real), dim=-2)
    for name in ("conv_states", "recurrent_states"):
        for at, state in (getattr(kept, name, None) or {}).items():
            if state is not None:
                found[f"{name} {at}"] = state
    return found


def assert_cache_equal(
    got: Any,
    want: Any,
    real: Tensor,
    what: str,
    *,
    truth: Any = None,
    bitwise: bool = False,
    layers: int | None = None,
) -> None:
    """All that every layer keeps (of the first `layers` layers), see `held`."""
    assert len(got.layers) >= len(want.layers[:layers]), f"{what}: {len(got.layers)} cache layers"
    for layer in range(len(want.layers[:layers])):
        sides = [held(c, layer, real) for c in (got, want, truth) if c is not None]
        assert sides[0].keys() == sides[1].keys(), f"{what} layer={layer}: {sides[0].keys()}"
        for name in sides[1]:
            tensors = [side[name] for side in sides]
            where = f"{what} layer={layer} {name}"
            if bitwise:
                assert_same(tensors[0], tensors[1], where)
            else:
                assert_close(tensors[0], tensors[1], where, *tensors[2:])


def assert_row_equal(
    got: Any, got_real: Tensor, row: int, want: Any, want_real: Tensor, what: str
) -> None:
    """Row `row` of one cache against the only row of another, whose padding may differ.

    Windows of padded rows hold fewer real tokens: the last common ones are compared.
    """
    for layer in range(len(want.layers)):
        mine = visible_cache(got, layer, got_real)[row]
        alone = visible_cache(want, layer, want_real)[0]
        for part, name in enumerate(("keys", "values")):
            n = min(mine[part].shape[-2], alone[part].shape[-2])
            x, y = mine[part], alone[part]
            x, y = x[:, x.shape[-2] - n :], y[:, y.shape[-2] - n :]
            assert_close(x, y, f"{what} layer={layer} {name}")
