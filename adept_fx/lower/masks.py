"""Leaves out masks that forbid nothing but places of a static cache that are empty yet."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from adept_fx.graph.blocks import AttentionRegion, MixerRegion, Stage
from adept_fx.intercept import MaskCall
from adept_fx.ops.attention import Attention
from adept_fx.runtime.call import Call
from adept_fx.runtime.masks import past_length, takes_4d


def slices_keys(graph: fx.GraphModule, masks: Iterable[str]) -> bool:
    """Whether keys may be cut to those that there are: nothing else has their length.

    True if all that sees cached keys is attention by a registered function, and all that sees a
    mask is attention.

    Args:
        graph: The exit-aware graph.
        masks: Names of its inputs that are masks.
    """
    stages = [block for block in graph.children() if isinstance(block, Stage)]
    parts = [part for stage in stages for part in stage.graph.children()]
    if any(isinstance(part, MixerRegion) for part in parts):
        return False
    regions = [part for part in parts if isinstance(part, AttentionRegion)]
    return all(map(_is_plain, regions)) and all(_only_masks(graph, name) for name in masks)


def _only_masks(graph: fx.GraphModule, name: str) -> bool:
    """Whether an input goes to stages, and there to attention, and nowhere else."""
    inputs = [node for node in graph.graph.find_nodes(op="placeholder") if node.name == name]
    for user in [user for node in inputs for user in node.users]:
        stage = graph.get_submodule(str(user.target)) if user.op == "call_module" else None
        if not isinstance(stage, Stage):
            return False
        own = stage.graph.graph.find_nodes(op="placeholder")
        places = [at for at, item in enumerate(user.args) if item in inputs]
        for reader in [reader for at in places for reader in own[at].users]:
            if reader.op != "call_module":
                return False
            if not isinstance(stage.graph.get_submodule(str(reader.target)), AttentionRegion):
                return False
    return True


def _is_plain(region: AttentionRegion) -> bool:
    inner = [node for node in region.graph.graph.nodes if node.op not in ("placeholder", "output")]
    if len(inner) != 1 or inner[0].op != "call_module":
        return False
    call = region.graph.get_submodule(str(inner[0].target))
    return isinstance(call, Attention) and not call.call[0].extras


def known_keys(masks: Iterable[MaskCall], call: Call, kinds: Iterable[int]) -> int | None:
    """:func:`visible_keys`, where it follows from how the masks would be built.

    Then they need not be. A causal mask allows one new token every key that there is, a sliding
    window as many as it is wide, if none is padding.

    Args:
        masks: The calls of the mask functions.
        call: The call of the decoder.
        kinds: One layer of each kind of the cache's.
    """
    cache, padding = call.cache, call.attention_mask
    if call.embeds.shape[1] != 1 or call.embeds.device.type != "cpu":
        return None
    if cache is None or not getattr(cache, "is_compileable", False):
        return None
    count = past_length(cache) + 1
    if padding is not None and not _covers(padding, count):
        return None
    if not all(_sees_all(item, count) for item in masks):
        return None
    if any(int(cache.get_mask_sizes(1, layer)[0]) <= count for layer in kinds):
        return None  # full: see `fills`
    return count


def _covers(padding: Any, count: int) -> bool:
    plain = isinstance(padding, Tensor) and padding.ndim == 2 and padding.shape[1] >= count
    return plain and bool(padding.all())


def _sees_all(call: MaskCall, count: int) -> bool:
    keywords = {name for name, value in call.keywords.items() if value is not None}
    if keywords != {"config"} or not takes_4d(call):
        return False
    if call.function is create_sliding_window_causal_mask:
        return bool(count <= call.keywords["config"].sliding_window)
    return call.function is create_causal_mask


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


def prompt_keys(masks: Sequence[Any], cache: Any, tokens: int) -> int | None:
    """How many keys a whole prompt may attend to, if transformers left its masks out.

    The other places of a static cache are empty. None if there are no others, or there is a mask.

    Args:
        masks: The call's masks.
        cache: Its cache.
        tokens: New tokens per row.
    """
    if tokens == 1 or cache is None or any(mask is not None for mask in masks):
        return None
    if past_length(cache) or not getattr(cache, "is_compileable", False):
        return None
    return tokens


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
