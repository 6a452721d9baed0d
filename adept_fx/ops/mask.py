"""``adept_fx::mask``: marks an attention mask that transformers builds from the call's inputs.

``slots [R, T]`` is a probe that carries the symbol of the key length. ``call`` indexes the
recorded mask function. Normalization turns the node into a graph input: at run time
transformers' own function is called, and its decision (also ``None``) is passed on.

``adept_fx::token_mask`` is the same for the ``[B, S]`` masks of layers with recurrent state.
"""

import torch
from torch import Tensor

torch.library.define(
    "adept_fx::mask", "(Tensor embeds, Tensor slots, int call, ScalarType dtype) -> Tensor"
)


@torch.library.register_fake("adept_fx::mask")
def _(embeds: Tensor, slots: Tensor, call: int, dtype: torch.dtype) -> Tensor:
    shape = (embeds.shape[0], 1, embeds.shape[1], slots.shape[1])
    return embeds.new_empty(shape, dtype=dtype)


torch.library.define("adept_fx::token_mask", "(Tensor embeds, int call) -> Tensor")


@torch.library.register_fake("adept_fx::token_mask")
def _(embeds: Tensor, call: int) -> Tensor:
    return embeds.new_empty(embeds.shape[:2], dtype=torch.long)
