"""Looks at a model before anything is done to it, and refuses what cannot be rewritten."""

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from adept_fx.errors import UnsupportedModelError
from adept_fx.runtime.decoder import ExitAwareForward
from adept_fx.runtime.fingerprint import refuse_offloading


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
            hint="pass a PreTrainedModel; of a wrapper, the model inside (PEFT: get_base_model())",
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder",
            hint="only decoders with one residual stream are supported",
        )
    refuse_offloading(model)


def find_decoder(model: Any) -> Any:
    """The decoder of a model, by ``get_decoder()``.

    Raises:
        UnsupportedModelError: It has none, or one that keeps nothing in a cache.
    """
    decoder = _bare(model.get_decoder() if hasattr(model, "get_decoder") else None)
    if decoder is None:
        decoder = _bare(getattr(model, "base_model", None))
    if decoder is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder that get_decoder() or base_model finds",
            hint="only decoder-only language models are supported",
        )
    _refuse_without_cache(decoder)
    _refuse_dynamic_rotary(decoder)
    return decoder


def _bare(found: Any) -> Any:
    """What was found, without a language modelling head; None if it is no decoder."""
    while isinstance(found, PreTrainedModel):
        head: Any = found
        if head.get_output_embeddings() is None:
            break
        inner: Any = found.base_model
        found = inner if inner is not found else _embedding_child(found)
    known = isinstance(found, PreTrainedModel) and found.get_input_embeddings() is not None
    return found if known else None


def _embedding_child(model: PreTrainedModel) -> PreTrainedModel | None:
    """The model inside ``model`` that embeds its tokens."""
    embedding = model.get_input_embeddings()
    for child in model.children():
        if isinstance(child, PreTrainedModel) and any(m is embedding for m in child.modules()):
            return child
    return None


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
