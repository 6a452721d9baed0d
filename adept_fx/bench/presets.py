"""Models with random weights, by size."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 8},
    "200m": {"hidden_size": 1024, "intermediate_size": 2560, "num_hidden_layers": 16},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}
_HEAD = {"tiny": 16, "200m": 64, "1b": 64, "8b": 128}
_VOCABULARY = {"tiny": 256, "200m": 16384, "1b": 128256, "8b": 128256}


def config_of(name: str) -> LlamaConfig:
    """The config of a preset: a Llama with grouped queries."""
    sizes: dict[str, Any] = dict(PRESETS[name])
    heads = sizes["hidden_size"] // _HEAD[name]
    return LlamaConfig(
        **sizes,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // (4 if name == "8b" else 2), 1),
        head_dim=_HEAD[name],
        vocab_size=_VOCABULARY[name],
        max_position_embeddings=8192,
        tie_word_embeddings=name != "8b",
    )


def build(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of that size, made where it will run."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model: Any = LlamaForCausalLM(config_of(name))
    finally:
        torch.set_default_dtype(before)
    return model.eval()
