"""Tiny configs follow from the names and values of config fields."""

from __future__ import annotations

import ast
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from adept_fx.check import model as built
from adept_fx.check import tiny
from adept_fx.check.tiny import LAYERS, VOCAB, tiny_config

SAMPLE = [
    *("llama", "qwen3", "gpt2", "gpt_neox", "opt", "bloom", "gemma3_text", "mixtral"),
    *("deepseek_v3", "gpt_oss", "qwen3_next", "lfm2", "jamba", "falcon", "mpt", "biogpt"),
]


@pytest.mark.parametrize("model_type", SAMPLE)
def test_models_are_tiny(model_type: str) -> None:
    config = tiny_config(model_type)
    assert type(config) is type(AutoConfig.for_model(model_type))
    assert config.num_hidden_layers == LAYERS
    assert config.vocab_size == VOCAB
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) < 300_000


KINDS = {
    "gemma3_text": ["sliding_attention", "full_attention"],
    "gpt_oss": ["sliding_attention", "full_attention"],
    "qwen3_next": ["linear_attention", "full_attention"],
    "lfm2": ["full_attention", "conv"],
}


@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.parametrize("layers", [2, 3, 6])
def test_every_kind_of_layer_comes_in_turn(model_type: str, layers: int) -> None:
    config = tiny_config(model_type, layers)
    assert config.num_hidden_layers == layers
    assert config.layer_types == [KINDS[model_type][at % 2] for at in range(layers)]


class OddConfig(PreTrainedConfig):
    """A type that nobody knows, with sizes under names that others use."""

    model_type = "odd_one"

    def __init__(self, **fields: Any) -> None:
        defaults: dict[str, Any] = {
            "n_embd": 4096,
            "n_layer": 48,
            "num_hidden_layers": 48,
            "n_head": 64,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "kv_n_heads": 64,
            "head_dim": 128,
            "vocab_size": 100_000,
            "q_lora_rank": 1536,
            "ffn_dim": 16_384,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_topk": 1,
            "sliding_window": 4096,
            "attention_dropout": 0.1,
            "max_position_embeddings": 1 << 20,
            "pad_token_id": 99_999,
            "layer_types": ["full_attention"] * 24 + ["sliding_attention"] * 24,
            "per_layer": [1] * 47 + [2],
            "three_numbers": [7, 8, 9],
            "rope_theta": 10_000.0,
            "tie": True,
            "name": "hidden_size",
            "nothing": None,
            "experts_per_tok_scale": 2.5,
        }
        for name, value in (defaults | fields).items():
            setattr(self, name, value)
        super().__init__()


@pytest.fixture
def odd() -> Iterator[PreTrainedConfig]:
    AutoConfig.register("odd_one", OddConfig)
    try:
        yield tiny_config("odd_one", 3)
    finally:
        CONFIG_MAPPING._extra_content.pop("odd_one")


def test_an_unknown_type_is_shrunk_by_the_names_of_its_fields(odd: Any) -> None:
    assert odd.n_embd == 32
    assert (odd.n_layer, odd.num_hidden_layers) == (3, 3)
    assert (odd.n_head, odd.num_attention_heads) == (4, 4)
    assert odd.num_key_value_heads == 2, "grouped, as the default is"
    assert odd.kv_n_heads == 4, "as many as heads, as the default has"
    assert (odd.head_dim, odd.q_lora_rank, odd.vocab_size) == (8, 16, VOCAB)
    assert (odd.num_local_experts, odd.num_experts_per_tok) == (4, 2)
    assert odd.moe_topk == 1
    assert (odd.sliding_window, odd.attention_dropout, odd.pad_token_id) == (6, 0.0, 0)
    assert odd.ffn_dim < 100
    assert odd.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    assert odd.per_layer == [1, 2, 1]


def test_what_is_no_size_stays(odd: Any) -> None:
    assert odd.three_numbers == [7, 8, 9]
    assert (odd.rope_theta, odd.tie, odd.name, odd.nothing) == (10_000.0, True, "hidden_size", None)
    assert odd.experts_per_tok_scale == 2.5


def test_no_model_type_is_named() -> None:
    texts = {
        node.value
        for module in (tiny, built)
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert not texts & set(CONFIG_MAPPING_NAMES)


def test_weights_are_seeded_and_layers_change_their_input() -> None:
    one, same = built.build("llama"), built.build("llama")
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name]), name
    states: list[torch.Tensor] = []
    for layer in one.model.layers:
        layer.register_forward_hook(lambda m, a, out: states.append(out))
    with torch.no_grad():
        one(torch.arange(3, 19)[None])
    for before, after in itertools.pairwise(states):
        assert 0.3 < (after - before).std() / before.std() < 3
