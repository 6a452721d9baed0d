"""``adept_fx::index_write``: marks ``Cache.update_indexer(keys, layer)``.

Layers with sparse attention keep a second set of keys, by which they choose what to attend to.
``keys [B, S, D]`` go in, all that the layer may choose from, ``[R, T, D]``, comes out. ``slots``
and ``synthesized`` are as in ``adept_fx::cache_write``, with one tensor per exit point.
"""

import torch
from torch import Tensor

torch.library.define(
    "adept_fx::index_write",
    "(Tensor keys, Tensor slots, int layer, Tensor[] synthesized) -> Tensor",
)


@torch.library.register_fake("adept_fx::index_write")
def _(keys: Tensor, slots: Tensor, layer: int, synthesized: list[Tensor]) -> Tensor:
    rows, length = slots.shape
    return keys.new_empty(rows, length, keys.shape[2])
