"""A cache whose reads and writes appear in a trace."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from adept_fx.intercept.recorder import FULL, Recorder

_CHUNKED = "chunked_attention"
_SLIDING = "sliding_attention"


class RecurrentAccessError(Exception):
    """Something in the decoder asked the cache for a recurrent or convolution state."""


class CaptureCache(DynamicCache):
    """A cache whose updates appear in the trace as ``adept_fx::cache_write`` and relatives."""

    def __init__(self, config: Any, recorder: Recorder) -> None:
        super().__init__(config=config)
        self.recorder = recorder
        self.kinds = cache_kinds(config, self)
        self._grown: dict[int, int] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Records the write; see ``adept_fx::cache_write``."""
        slots = self.recorder.slots_of(self.kinds.get(layer_idx, FULL))
        keys, values = torch.ops.adept_fx.cache_write(
            key_states, value_states, slots, layer_idx, []
        )
        self._grown[layer_idx] = key_states.shape[2]
        return keys, values

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Records the write of a sparse attention's index keys; see ``adept_fx::index_write``."""
        slots = self.recorder.slots_of(self.kinds.get(layer_idx, FULL))
        keys: Tensor = torch.ops.adept_fx.index_write(indexer_key_states, slots, layer_idx, [])
        return keys

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The symbol of the past length, plus the new tokens once the layer is written."""
        if self.recorder.past is None:
            raise RuntimeError("the capture has no probe for the past length")
        return self.recorder.past.shape[0] + self._grown.get(layer_idx, 0)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The symbol of the past length."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The symbol of the key length of this kind of layer."""
        return self.recorder.slots_of(self.kinds.get(layer_idx, FULL)).shape[1], 0

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Tells the capture that the module in charge must be a marker as a whole."""
        raise RecurrentAccessError

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """As :meth:`get_conv_state`."""
        raise RecurrentAccessError

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """As :meth:`get_conv_state`."""
        raise RecurrentAccessError

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """As :meth:`get_conv_state`."""
        raise RecurrentAccessError

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """As :meth:`get_conv_state`."""
        raise RecurrentAccessError


def cache_kinds(config: Any, cache: DynamicCache) -> dict[int, str]:
    """The kind of each cache layer: layers of one kind have one key length."""
    types = getattr(config.get_text_config(decoder=True), "layer_types", None) or []
    kinds = {}
    for index, layer in enumerate(cache.layers):
        declared = types[index] if len(types) == len(cache.layers) else None
        if not getattr(layer, "is_sliding", False):
            kinds[index] = FULL
        else:
            kinds[index] = _CHUNKED if declared == _CHUNKED else _SLIDING
    return kinds


def recurrent_layers(cache: DynamicCache) -> list[int]:
    """Cache layers that hold a recurrent or convolution state."""
    return [i for i, layer in enumerate(cache.layers) if hasattr(layer, "update_conv_state")]
