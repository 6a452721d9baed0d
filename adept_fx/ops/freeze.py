"""``adept_fx::freeze``: keeps the state of tokens that have left.

Equivalent Python: ``torch.where(active[..., None], new, frozen)``. Stands at every layer border
after the first exit point. Only the masked-dense plan does the work; in the compacted plan no
token that has left is in the stage.
"""

import torch
from torch import Tensor

torch.library.define("adept_fx::freeze", "(Tensor new, Tensor frozen, Tensor active) -> Tensor")


@torch.library.register_fake("adept_fx::freeze")
def _(new: Tensor, frozen: Tensor, active: Tensor) -> Tensor:
    return torch.empty_like(new)
