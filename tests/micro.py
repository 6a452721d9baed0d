"""A micro model that has learned something, and what the tests of `fit` ask of models."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import adept_fx
from adept_fx import ExitConfig, FitConfig
from models import tiny

VOCAB, LENGTH, LAYERS = 36, 32, 4
EXITS = (1, 2)  # of the tiny model


@cache
def _tables() -> Tensor:
    """What follows a token, in each of eight languages."""
    generator = torch.Generator().manual_seed(7)
    return torch.stack([torch.randperm(VOCAB - 4, generator=generator) + 4 for _ in range(8)])


def texts(count: int, seed: int, length: int = LENGTH) -> Tensor:
    """Markov chains, each in a language that only its own tokens tell: `[N, S]`."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(4, VOCAB, (count, length), generator=generator)
    language = torch.randint(8, (count,), generator=generator)
    strange = torch.rand(count, length, generator=generator) < 0.1
    for at in range(1, length):
        follows = _tables()[language, found[:, at - 1] - 4]
        found[:, at] = torch.where(strange[:, at], found[:, at], follows)
    return found


@cache
def _trained() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for step in range(180):
        ids = texts(16, 1000 + step)
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 20, (180 - step) / 130)
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def trained() -> Any:
    """A copy of the micro model."""
    return copy.deepcopy(_trained())


def rewritten(model: Any = None, **options: Any) -> Any:
    """A model with seeded exits."""
    config = ExitConfig(**{"exits": (1, 2), "gate": "mlp"} | options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return adept_fx.transform(trained() if model is None else model, config)


@cache
def _everything(kv: str) -> tuple[Any, dict[str, Tensor], list[Any]]:
    ee = rewritten(tiny("llama", layers=3), exits=EXITS, adapter_rank=3, kv=kv, kv_rank=2)
    return ee, weights(ee), ee.adept.gate_list()


def everything(gates: Any = None, kv: str = "map") -> Any:
    """A tiny model with all parts, new again at every call."""
    ee, new, old = _everything(kv)
    ee.adept.set_gates(old)
    ee.load_state_dict(new)
    if gates is not None:
        ee.adept.set_gates(gates)
    ee.requires_grad_(True)
    return ee.eval()


def settings(**options: Any) -> FitConfig:
    """A short training that says nothing."""
    trainer = {"disable_tqdm": True, "logging_steps": 1} | options.pop("trainer", {})
    short = {"steps": 4, "batch_size": 4, "length": LENGTH, "tokens_per_step": 64}
    return FitConfig(**short | options, trainer=trainer)


def weights(model: Any) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(model: Any, before: dict[str, Tensor]) -> set[str]:
    """Names of those that are no longer the same, bit for bit."""
    now = model.state_dict()
    assert now.keys() == before.keys()
    return {
        name
        for name, value in now.items()
        if value.dtype != before[name].dtype or not torch.equal(value, before[name])
    }
