"""Masks of a call: what transformers builds from them, and which tokens are padding."""

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask

from adept_fx.errors import InputError
from adept_fx.intercept import FULL, MaskCall

Mask = Tensor | dict[str, Tensor] | None


def build_mask(
    call: MaskCall, mask: Mask, embeds: Tensor, cache: Any, position_ids: Tensor | None
) -> Tensor | None:
    """The mask that the model would have built here; None where transformers needs none."""
    if isinstance(mask, dict):
        if call.key not in mask:
            raise InputError(
                f"attention_mask is a dict without {call.key!r} (it has {sorted(mask)})",
                hint="pass one mask per kind of layer",
            )
        return mask[call.key]
    supplied = {
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "past_key_values": cache,
        "position_ids": position_ids,
    }
    # attention_mask and past_key_values have no default in transformers' functions.
    keep = call.inputs | {"attention_mask", "past_key_values"}
    chosen = {name: value for name, value in supplied.items() if name in keep}
    built: Tensor | None = call.function(**call.keywords, **chosen)
    return built


def fits_rows(call: MaskCall, mask: Any, tokens: int) -> bool:
    """Whether attention can be given some tokens of each row, each with its own part of the mask.

    Kernels that read one number per key, or blocks, cannot. None says that each query sees what
    its place in the row allows: known for sure of one new token per row, and of the kernels that
    would have taken a 4-D mask otherwise.

    Args:
        call: How the mask was built.
        mask: The mask, as the kernel takes it.
        tokens: New tokens per row.
    """
    if mask is not None:
        return isinstance(mask, Tensor) and mask.ndim == 4
    return tokens == 1 or takes_4d(call)


def takes_4d(call: MaskCall) -> bool:
    """Whether the kernel of this mask takes one number per query and key."""
    kernel = call.keywords["config"]._attn_implementation
    known = kernel in ALL_MASK_ATTENTION_FUNCTIONS
    built = ALL_MASK_ATTENTION_FUNCTIONS[kernel] if known else None
    return built in (sdpa_mask, eager_mask)


def past_length(cache: Any) -> int:
    """Tokens that the cache holds already."""
    return 0 if cache is None else int(cache.get_seq_length())


def real_tokens(mask: Mask, shape: tuple[int, int], cache: Any) -> Tensor | None:
    """Which of the call's tokens are not padding, ``[B, S]`` bool; None if all are real.

    A token is padding iff the 2-D mask says so or, given only a 4-D mask, iff it may not attend
    to itself.
    """
    if mask is None:
        return None
    offset = past_length(cache)
    if isinstance(mask, dict):
        key = FULL if FULL in mask else sorted(mask)[0]
        mask = mask[key]
    if not isinstance(mask, Tensor):
        return None  # masks of other kernels say nothing about single tokens
    real = _from_2d(mask, shape, offset) if mask.ndim == 2 else _from_4d(mask, shape, cache, offset)
    return None if real is None or bool(real.all()) else real


def _from_2d(mask: Tensor, shape: tuple[int, int], offset: int) -> Tensor:
    tokens = shape[1]
    start = offset if mask.shape[1] >= offset + tokens else max(mask.shape[1] - tokens, 0)
    return mask[:, start : start + tokens].bool().expand(shape)


def _from_4d(mask: Tensor, shape: tuple[int, int], cache: Any, offset: int) -> Tensor | None:
    if mask.ndim != 4:
        raise InputError(
            f"attention_mask has {mask.ndim} dimensions", hint="pass a 2-D or a 4-D mask"
        )
    batch, tokens = shape
    # A sliding cache drops its oldest keys; the layer whose keys the mask covers tells how many.
    dropped = 0
    if cache is not None and mask.shape[-1] != offset + tokens:
        dropped = _dropped(cache, tokens, mask.shape[-1])
    own = offset - dropped + torch.arange(tokens, device=mask.device)
    if int(own[-1]) >= mask.shape[-1]:
        return None
    step = torch.arange(tokens, device=mask.device)
    allowed = mask[:, 0, step, own]
    if allowed.dtype != torch.bool:
        allowed = allowed > torch.finfo(allowed.dtype).min / 2
    return allowed.expand(batch, tokens)


def _dropped(cache: Any, tokens: int, length: int) -> int:
    for layer in range(len(cache.layers)):
        size, offset = cache.get_mask_sizes(tokens, layer)
        if int(size) == length:
            return int(offset)
    return 0
