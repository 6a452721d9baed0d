"""Looks at a model before anything is done to it, and refuses what cannot be rewritten."""

import inspect
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel

from adept_fx.errors import UnsupportedModelError
from adept_fx.runtime.decoder import ExitAwareForward


def refuse(model: nn.Module) -> None:
    """Raises for models of a kind that is not supported at all.

    Raises:
        UnsupportedModelError: Not a transformers model, an encoder-decoder, transformed already,
            or spread by accelerate hooks.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__} is not a model")
    forwards = [vars(module).get("forward") for module in model.modules()]
    if any(isinstance(forward, ExitAwareForward) for forward in forwards):
        raise UnsupportedModelError(
            "this model is transformed already",
            hint="adept_fx.restore(model) first, or change model.adept.thresholds",
        )
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model",
            hint="pass a PreTrainedModel; of a wrapper, the model inside",
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder",
            hint="only decoders with one residual stream are supported",
        )
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise UnsupportedModelError(
                f"module {name or 'model'} has an accelerate hook (offloading or several devices)",
                hint="load the model on one device, without device_map",
            )


def find_decoder(model: Any) -> Any:
    """The decoder of a model, by ``get_decoder()``.

    Raises:
        UnsupportedModelError: It has none, or one with layers that carry recurrent state.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not isinstance(decoder, PreTrainedModel) or decoder.get_input_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder that get_decoder() finds",
            hint="only decoder-only language models are supported",
        )
    _refuse_without_cache(decoder)
    _refuse_dynamic_rotary(decoder)
    _refuse_recurrent(decoder)
    return decoder


def _refuse_dynamic_rotary(decoder: Any) -> None:
    """Rotary modules that look at the values of a call's positions cannot be traced."""
    for name, module in decoder.named_modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind in ("dynamic", "longrope"):
                raise UnsupportedModelError(
                    f"{name} of {type(decoder).__name__} changes its rotary frequencies with the "
                    f"longest position of each call (rope_type {kind!r})",
                    hint="use a checkpoint or config with a fixed rope_type, such as 'yarn'",
                )


def _refuse_without_cache(decoder: Any) -> None:
    parameters = inspect.signature(type(decoder).forward).parameters
    if "past_key_values" in parameters:
        return
    reason = "carries recurrent state" if "cache_params" in parameters else "has no KV cache"
    raise UnsupportedModelError(
        f"{type(decoder).__name__} {reason}: its forward takes no past_key_values",
        hint="only decoders whose layers keep keys and values are supported",
    )


def _refuse_recurrent(decoder: Any) -> None:
    cache = DynamicCache(config=decoder.config)
    types = getattr(decoder.config, "layer_types", None) or []
    recurrent = [
        f"{index} ({types[index] if index < len(types) else type(layer).__name__})"
        for index, layer in enumerate(cache.layers)
        if hasattr(layer, "update_recurrent_state") or hasattr(layer, "update_conv_state")
    ]
    if recurrent:
        raise UnsupportedModelError(
            f"layers {', '.join(recurrent)} of {type(decoder).__name__} carry recurrent state",
            hint="only layers that keep keys and values are supported",
        )
