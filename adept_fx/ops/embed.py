"""``adept_fx::embed``: marks the output of the input embedding.

Equivalent Python: ``return embeds.clone()``. Normalization cuts the graph here, so that one
capture serves both ``input_ids`` and ``inputs_embeds``.
"""

import torch
from torch import Tensor

torch.library.define("adept_fx::embed", "(Tensor embeds) -> Tensor")


@torch.library.register_fake("adept_fx::embed")
def _(embeds: Tensor) -> Tensor:
    return torch.empty_like(embeds)
