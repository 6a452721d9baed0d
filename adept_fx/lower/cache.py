"""The layers of a call's cache behind the slots of a stage."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache


class Slots:
    """Finds the cache layers that a stage writes.

    Args:
        names: What the stage's compiled graph calls each of its slots.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self.layers = {
            name: int(slot.rpartition("_")[2])
            for slot, name in names.items()
            if not slot.startswith("mixer")
        }

    def of(self, cache: Any) -> dict[str, Any] | None:
        """A layer to write each slot to; None without a cache."""
        if cache is None:
            return None
        if type(cache).update is not Cache.update or cache.offloading:
            return {name: _Through(cache, at) for name, at in self.layers.items()}
        layers = cache.layers
        if cache.layer_class_to_replicate is not None:
            while self.layers and len(layers) <= max(self.layers.values()):
                layers.append(cache.layer_class_to_replicate())
        return {name: layers[at] for name, at in self.layers.items()}

    @staticmethod
    def state(layers: Mapping[str, Any] | None) -> Any:
        """What a compiled function depends on: kind of the layers, and whether they hold keys."""
        if not layers:
            return layers is None
        first = next(iter(layers.values()))
        return type(first), getattr(first, "is_initialized", None)


class _Through:
    """A layer of a cache that does more than hand its layers the new keys; never compiled."""

    is_initialized = None

    def __init__(self, cache: Any, layer: int) -> None:
        self.cache = cache
        self.layer = layer

    @torch.compiler.disable
    def update(self, key: Tensor, value: Tensor) -> Any:
        return self.cache.update(key, value, self.layer)

    @torch.compiler.disable
    def update_indexer(self, key: Tensor) -> Any:
        return self.cache.update_indexer(key, self.layer)
