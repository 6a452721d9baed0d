"""Mask functions as markers."""

import inspect
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from adept_fx.errors import UnsupportedModelError
from adept_fx.intercept.recorder import MaskCall, Recorder, replace

RECURRENT = masking_utils.create_recurrent_attention_mask
"""Gives the 2-D mask ``[B, S]`` of new tokens; the others give 4-D masks."""

_BOTH_WAYS = (
    masking_utils.create_bidirectional_mask,
    masking_utils.create_bidirectional_sliding_window_mask,
)


def _mask_functions() -> dict[Callable[..., Any], list[tuple[str, dict[str, Any]]]]:
    """The mask functions of transformers, each with its keys in a dict of masks.

    A key may stand for a function with certain keywords.
    """
    found: dict[Callable[..., Any], list[tuple[str, dict[str, Any]]]] = {}
    for key, item in masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING.items():
        function, keywords = (item.func, item.keywords) if isinstance(item, partial) else (item, {})
        if inspect.isfunction(function):
            found.setdefault(function, []).append((key, keywords))
    return found


def patch_masks(stack: ExitStack, decoder: nn.Module, recorder: Recorder, thread: int) -> None:
    """Replaces the mask functions in the modules that define the decoder's parts."""
    functions = _mask_functions()
    modules = {sys.modules[type(module).__module__] for module in decoder.modules()}
    for module in modules:
        for name, value in list(vars(module).items()):
            if not inspect.isfunction(value):
                continue
            if value in functions:
                replace(
                    stack, module, name, _mask_marker(value, functions[value], recorder, thread)
                )
            elif value in _BOTH_WAYS:
                replace(stack, module, name, _refusal(value, type(decoder).__name__, thread))


def _refusal(function: Callable[..., Any], name: str, thread: int) -> Callable[..., Any]:
    signature = inspect.signature(function)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return function(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        if given.get("attention_mask") is None:
            return None  # the mask of an encoder that is not there
        raise UnsupportedModelError(
            f"{name} attends in both directions: it is an encoder",
            hint="only causal decoders are supported",
        )

    return refuse


def _mask_marker(
    function: Callable[..., Any],
    keys: list[tuple[str, dict[str, Any]]],
    recorder: Recorder,
    thread: int,
) -> Callable[..., Any]:
    signature = inspect.signature(function)
    from_call = ("inputs_embeds", "attention_mask", "past_key_values", "position_ids")

    def marker(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return function(*args, **kwargs)
        bound = dict(signature.bind(*args, **kwargs).arguments)
        inputs = frozenset(name for name in from_call if bound.get(name) is not None)
        static = {name: item for name, item in bound.items() if name not in from_call}
        _refuse_tensors(function, static)
        key = _key(keys, static)
        recorder.masks.append(MaskCall(function, key, static, inputs))
        embeds: Tensor = bound["inputs_embeds"]
        if function is RECURRENT:
            return torch.ops.adept_fx.token_mask(embeds, len(recorder.masks) - 1)
        eager = bound["config"]._attn_implementation == "eager"
        return torch.ops.adept_fx.mask(
            embeds,
            recorder.slots_of(key),
            len(recorder.masks) - 1,
            embeds.dtype if eager else torch.bool,
        )

    return marker


def _key(keys: list[tuple[str, dict[str, Any]]], given: dict[str, Any]) -> str:
    """The key whose keywords fit the call best."""
    fitting = [item for item in keys if item[1].items() <= given.items()] or keys
    return max(fitting, key=lambda item: len(item[1]))[0]


def _refuse_tensors(function: Callable[..., Any], static: dict[str, Any]) -> None:
    for name, item in static.items():
        captured = [cell.cell_contents for cell in getattr(item, "__closure__", None) or ()]
        if any(isinstance(part, Tensor) for part in (item, *captured)):
            raise UnsupportedModelError(
                f"the decoder passes a tensor of its own to {function.__name__}({name}=...), "
                "which cannot be rebuilt at run time",
                hint="use a decoder whose masks depend on attention_mask and position_ids only",
            )
