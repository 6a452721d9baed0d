"""``adept_fx::attention``: marks a call of the attention function that the model chose.

The marker records the function (``sdpa``, the model's own ``eager`` ...), the attention module
and its keywords. :class:`Attention` calls exactly that function at run time, so that masks of
``None``, ``is_causal`` and packed grouped queries stay transformers' own decisions, bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

torch.library.define(
    "adept_fx::attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor[] extras, int call) -> Tensor",
)


@torch.library.register_fake("adept_fx::attention")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    extras: list[Tensor],
    call: int,
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@dataclass
class AttentionCall:
    """One recorded attention call: ``function(module, q, k, v, mask, **keywords)``."""

    function: Callable[..., Any]
    module: nn.Module
    keywords: dict[str, Any]
    extras: tuple[str, ...] = field(default=())


class Attention(nn.Module):
    """Runs a recorded attention call on tensors of any batch and length.

    Args:
        call: What was recorded. The module is referenced, not registered: it stays the model's.
    """

    def __init__(self, call: AttentionCall) -> None:
        super().__init__()
        self.call = [call]  # in a list: the model's module must not become a child of this one

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, extras: list[Tensor]
    ) -> Tensor:
        """Returns the attention output ``[B, S, H, Dv]``, contiguous."""
        call = self.call[0]
        keywords = call.keywords | dict(zip(call.extras, extras, strict=True))
        output: Tensor = call.function(call.module, query, key, value, mask, **keywords)[0]
        return output.contiguous()
