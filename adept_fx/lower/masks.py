"""Leaves out masks that forbid nothing but places of a static cache that are empty yet."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from adept_fx.graph.blocks import AttentionRegion, MixerRegion, Stage
from adept_fx.ops.attention import Attention
from adept_fx.runtime.masks import past_length


def slices_keys(graph: fx.GraphModule) -> bool:
    """Whether keys may be cut to those that there are: nothing else has their length.

    True if all that sees cached keys is attention by a registered function.
    """
    stages = [block for block in graph.children() if isinstance(block, Stage)]
    parts = [part for stage in stages for part in stage.graph.children()]
    return not any(isinstance(part, MixerRegion) for part in parts) and all(
        _is_plain(part) for part in parts if isinstance(part, AttentionRegion)
    )


def _is_plain(region: AttentionRegion) -> bool:
    inner = [node for node in region.graph.graph.nodes if node.op not in ("placeholder", "output")]
    if len(inner) != 1 or inner[0].op != "call_module":
        return False
    call = region.graph.get_submodule(str(inner[0].target))
    return isinstance(call, Attention) and not call.call[0].extras


def visible_keys(masks: Sequence[Any], cache: Any, tokens: int) -> int | None:
    """How many keys one new token per row may attend to, if it may attend to all of them.

    Then attention needs no mask, if it is given those keys alone. None where it needs one, or
    where looking at the mask would stall the device.

    Args:
        masks: The call's masks.
        cache: Its cache.
        tokens: New tokens per row.
    """
    found = [mask for mask in masks if mask is not None]
    if tokens != 1 or cache is None or not found:
        return None
    count = past_length(cache) + 1
    return count if all(_allows(mask, count) for mask in found) else None


def fills(masks: Sequence[Any], visible: int) -> bool:
    """Whether a cache is full with these keys: then there is nothing to cut."""
    return any(mask is not None and mask.shape[-1] == visible for mask in masks)


def _allows(mask: Any, count: int) -> bool:
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.device.type != "cpu":
        return False
    if mask.shape[-1] < count:
        return False
    seen = mask[..., :count]
    return bool(seen.all() if mask.dtype is torch.bool else (seen == 0).all())
