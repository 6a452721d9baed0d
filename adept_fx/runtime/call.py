"""Reads the arguments of a decoder call."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from adept_fx.errors import InputError

_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
# Passed down by transformers' heads and Trainer; a decoder's layers do nothing with them.
_HARMLESS = frozenset(
    {"cache_position", "num_items_in_batch", "logits_to_keep", "return_dict", "is_causal"}
)
_READ = frozenset(
    {
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values",
        "inputs_embeds",
        "use_cache",
    }
)
# Further arguments with one entry per token that a decoder may take.
_PER_TOKEN = frozenset({"per_layer_inputs", "token_type_ids"})


@dataclass
class Call:
    """A decoder call, with transformers' defaults filled in."""

    embeds: Tensor
    ids: Tensor | None
    attention_mask: Any
    position_ids: Tensor | None
    extras: dict[str, Tensor]
    cache: Any
    wants_cache: bool  # the caller passed a cache, or asked for one
    return_dict: bool


def read_call(
    decoder: nn.Module,
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Call:
    """Binds the arguments of ``decoder(...)`` as its own forward would.

    Args:
        decoder: The decoder.
        signature: Of its class's forward, without ``self``.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Raises:
        InputError: An argument asks for something that an exit-aware graph does not have.
    """
    config: Any = decoder.config
    given = _bound(signature, args, kwargs)
    _refuse_outputs(config, given)
    embeds = _embeds(decoder, given)
    extras = {}
    for name, value in given.items():
        if name in _READ | _HARMLESS or not isinstance(value, Tensor):
            continue
        known = name in _PER_TOKEN and name in signature.parameters
        if not known or value.shape[:2] != embeds.shape[:2]:
            raise InputError(
                f"the argument {name} is not supported while exits are on",
                hint="leave it out, or call the original model",
            )
        extras[name] = value
    cache = given.get("past_key_values")
    use_cache = given.get("use_cache")
    wants_cache = cache is not None or bool(use_cache)
    if (config.use_cache if use_cache is None else use_cache) and cache is None:
        cache = DynamicCache(config=config)
    return_dict = given.get("return_dict")
    default = getattr(config, "return_dict", True)
    return Call(
        embeds=embeds,
        ids=given.get("input_ids"),
        attention_mask=given.get("attention_mask"),
        position_ids=_positions(given.get("position_ids"), embeds),
        extras=extras,
        cache=cache,
        wants_cache=wants_cache,
        return_dict=bool(default if return_dict is None else return_dict),
    )


def _bound(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    if not args and kwargs.keys() <= signature.parameters.keys():
        return kwargs  # what binding would give, and most calls
    given = dict(signature.bind(*args, **kwargs).arguments)
    for extra in [value for value in given.values() if isinstance(value, dict)]:
        if extra is not given.get("attention_mask"):
            given = {k: v for k, v in given.items() if v is not extra} | extra
    return given


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What ``torch.autocast`` computes in on that device; None where it is off.

    It puts its casts into a graph when the graph is captured, so each has a graph of its own.
    """
    if not torch.amp.is_autocast_available(device.type):
        return None
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def _refuse_outputs(config: Any, given: dict[str, Any]) -> None:
    for name in _OUTPUTS:
        value = given.get(name)
        if getattr(config, name, False) if value is None else value:
            raise InputError(
                f"{name} is not available from an exit-aware model: tokens run different layers",
                hint=f"call the original model, or set {name}=False",
            )


def _embeds(decoder: nn.Module, given: dict[str, Any]) -> Tensor:
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise InputError("pass exactly one of input_ids and inputs_embeds")
    if embeds is not None:
        result: Tensor = embeds
        return result
    if not isinstance(ids, Tensor):
        raise InputError(f"input_ids must be a tensor, not {type(ids).__name__}")
    embedding: Any = decoder.get_input_embeddings()  # type: ignore[operator]
    result = embedding(ids.view(-1, ids.shape[-1]))
    if not isinstance(result, Tensor):
        raise InputError(f"the input embedding returned {type(result).__name__}, not a tensor")
    return result


def _positions(position_ids: Any, embeds: Tensor) -> Tensor | None:
    if position_ids is None:
        return None
    shape = embeds.shape[:2]
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2:
        raise InputError("position_ids must be a tensor of shape [batch, tokens]")
    return position_ids.expand(shape)
