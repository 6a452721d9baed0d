"""``adept_fx::cache_write``: marks ``Cache.update(key, value, layer)``.

``key [B, H, S, Dk]`` and ``value [B, H, S, Dv]`` go in, everything that the layer may attend to,
``[R, H, T, Dk]`` and ``[R, H, T, Dv]``, comes out. ``slots [R, T]`` carries the symbols of the
cached rows and the key length. ``synthesized`` lists keys and values of tokens that left earlier,
two per exit point, once the pass ``synthesize_kv`` has run.
"""

import torch
from torch import Tensor

torch.library.define(
    "adept_fx::cache_write",
    "(Tensor key, Tensor value, Tensor slots, int layer, Tensor[] synthesized) -> (Tensor, Tensor)",
)


@torch.library.register_fake("adept_fx::cache_write")
def _(
    key: Tensor, value: Tensor, slots: Tensor, layer: int, synthesized: list[Tensor]
) -> tuple[Tensor, Tensor]:
    rows, length = slots.shape
    keys = key.new_empty(rows, key.shape[1], length, key.shape[3])
    values = value.new_empty(rows, value.shape[1], length, value.shape[3])
    return keys, values
