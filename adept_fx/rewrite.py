"""``transform`` and ``restore``."""

from functools import partial
from typing import Any

import torch
from torch import nn

from adept_fx.config import ExitConfig
from adept_fx.errors import ConfigError, UnsupportedModelError, during
from adept_fx.gates.registry import build_gates
from adept_fx.inspect_model import find_decoder, refuse
from adept_fx.kv.base import maps_needed
from adept_fx.low_rank import ExitAdapter, KVMaps
from adept_fx.model_facts import hidden_size, layer_count
from adept_fx.runtime.decoder import ExitAwareForward
from adept_fx.runtime.equip import equip
from adept_fx.runtime.handle import Adept, handle
from adept_fx.runtime.head import Head
from adept_fx.runtime.pooling import Pooling
from adept_fx.sharing.pretrained import save_pretrained
from adept_fx.shell import path_to, rebuild, shell


def transform(model: nn.Module, config: ExitConfig | None = None) -> Any:
    """Rewrites a decoder model of transformers into one whose tokens leave early.

    ``model`` stays as it was and keeps working. The result shares all parameters and buffers with
    it, so ``.to()``, ``.train()`` and ``.requires_grad_()`` on one act on both; ``config`` and
    ``generation_config`` are copies.

    Args:
        model: A ``*ForCausalLM``, ``*ForSequenceClassification``, ``*ForTokenClassification`` or a
            bare decoder.
        config: Exit points, gates and thresholds. The default puts an untrained gate after every
            fourth layer, at threshold 1.0: nothing leaves.

    Returns:
        A model of the same class. Its handle is ``.adept``: see
        :class:`~adept_fx.runtime.handle.Adept`.

    Raises:
        ConfigError: The config does not fit the model.
        UnsupportedModelError: The model is refused; the message names what is in the way.
        CaptureError: The decoder cannot be traced.
    """
    config = ExitConfig() if config is None else config
    with during("model"):
        refuse(model)
    with during("decoder"):
        decoder = find_decoder(model)
        path = _path(model, decoder)
    with during("config"):
        resolved = _resolved(config, decoder)
    weight = decoder.get_input_embeddings().weight
    dtype = decoder.dtype if isinstance(decoder.dtype, torch.dtype) else weight.dtype
    with during("gates"):
        gates = build_gates(resolved, hidden_size(decoder), weight.device, dtype)
    adept = Adept(
        resolved,
        gates,
        adapters=_adapters(resolved, decoder, weight.device, dtype),
        kv_maps=_kv_maps(resolved, decoder, weight.device, dtype),
        one_threshold=config.prefill_threshold is None,
    )
    adept.train(model.training)
    memo: dict[int, Any] = {}
    exit_aware = shell(decoder, memo)
    forward = ExitAwareForward(adept, exit_aware)
    exit_aware.__dict__["forward"] = forward
    transformed = rebuild(model, path, exit_aware, memo)
    head = Head(transformed, exit_aware)
    if any(gate.needs & {"logits", "draft"} for gate in gates):
        with during("gates"):
            head.check()
    adept.link(forward, head)
    pooling = Pooling(transformed, exit_aware)
    if pooling.works():
        transformed.__dict__["forward"] = forward.pooling = pooling
    elif resolved.leave == "rows":
        raise ConfigError(
            f'leave="rows" is for sequence classifiers; the head of {type(model).__name__} gives '
            "no result per row, or cannot be followed",
            hint='leave="tokens"',
        )
    # Capture now: what cannot be rewritten is refused here, not at the first call.
    with during("capture"):
        program = forward.prepare()
    with during("gates"):
        equip(gates, program, head)
    transformed.add_module("adept", adept)
    if hasattr(transformed, "init_continuous_batching"):
        transformed.__dict__["init_continuous_batching"] = _refuse_continuous_batching
    # A partial: copy.deepcopy binds it to the copy.
    transformed.__dict__["save_pretrained"] = partial(save_pretrained, transformed)
    return transformed


def _path(model: nn.Module, decoder: nn.Module) -> list[str]:
    path = path_to(model, decoder)
    if path is None:
        raise UnsupportedModelError("get_decoder() returns a module that is not part of the model")
    return path


def _resolved(config: ExitConfig, decoder: nn.Module) -> ExitConfig:
    if not isinstance(config, ExitConfig):
        raise ConfigError(
            f"transform takes an ExitConfig, not {type(config).__name__}",
            hint="write adept_fx.ExitConfig(exits=...)",
        )
    return config.resolve(layer_count(decoder))


def _adapters(
    config: ExitConfig, decoder: nn.Module, device: torch.device, dtype: torch.dtype
) -> list[ExitAdapter]:
    size, rank = hidden_size(decoder), config.adapter_rank
    count = len(config.exit_layers) if rank else 0
    return [ExitAdapter(size, rank, device=device, dtype=dtype) for _ in range(count)]


def _kv_maps(
    config: ExitConfig, decoder: nn.Module, device: torch.device, dtype: torch.dtype
) -> KVMaps | None:
    exits = config.exit_layers
    count = maps_needed(config.kv, exits, layer_count(decoder))
    if not count:
        return None
    size = hidden_size(decoder)
    return KVMaps(size, config.kv_rank, len(exits), count, device=device, dtype=dtype)


def _refuse_continuous_batching(*args: Any, **kwargs: Any) -> None:
    """Refuses before transformers starts a thread, whose errors it would only log."""
    raise UnsupportedModelError(
        "continuous batching keeps keys and values in pages: an exit-aware model cannot write them",
        hint="call generate, or generate_batch of the original model",
    )


def restore(ee: nn.Module) -> Any:
    """Gives back the original model: same class, same parameters, no exits.

    Args:
        ee: A model returned by :func:`transform`. It keeps working, but is no longer compiled.

    Raises:
        UnsupportedModelError: ``ee`` was not transformed.
    """
    handle(ee).uncompile()
    return original(ee)


def original(ee: nn.Module) -> Any:
    """The original model beside a rewritten one, which stays as it is.

    Raises:
        UnsupportedModelError: ``ee`` was not transformed.
    """
    decoder = handle(ee).decoder
    path = path_to(ee, decoder)
    memo: dict[int, Any] = {}
    return rebuild(ee, path or [], shell(decoder, memo), memo)
