"""``adept_fx::attention``: marks a call of the attention function that the model chose.

The marker records the function (``sdpa``, the model's own ``eager`` ...), the attention module
and its keywords. :class:`Attention` calls exactly that function at run time, so that masks of
``None``, ``is_causal`` and packed grouped queries stay transformers' own decisions, bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

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
        if torch.compiler.is_compiling() and packs(call, query, mask):
            return packed_attention(call, query, key, value, mask)
        keywords = call.keywords | dict(zip(call.extras, extras, strict=True))
        output: Tensor = call.function(call.module, query, key, value, mask, **keywords)[0]
        return output.contiguous()


def packs(call: AttentionCall, query: Tensor, mask: Tensor | None) -> bool:
    """Whether grouped queries can be packed: one new token, one mask for all heads.

    The ``sdpa`` function does so itself in eager mode; compiled, it repeats keys and values
    instead, which takes four times as long on a CPU (one query of 16 heads, 8 of them of keys,
    over 256 keys: 346 against 79 us).
    """
    groups = getattr(call.module, "num_key_value_groups", 1)
    return (
        call.function is sdpa_attention_forward
        and not call.extras
        and call.keywords.get("softcap") is None
        and groups > 1
        and query.shape[2] == 1
        and (mask is None or mask.shape[1] == 1)
    )


def packed_attention(
    call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """What ``sdpa_attention_forward`` computes for one new token per row, ``[B, 1, H, Dv]``."""
    batch, heads, _, width = query.shape
    packed = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    output = F.scaled_dot_product_attention(
        packed,
        key,
        value,
        attn_mask=mask,
        dropout_p=call.keywords.get("dropout", 0.0),
        scale=call.keywords.get("scaling"),
    )
    return output.reshape(batch, 1, heads, value.shape[3])
