"""Models with random weights, by size. Nothing heavy is imported before one is made."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Llamas with grouped queries.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "tie_word_embeddings": True,
    },
    "200m": {
        "hidden_size": 1024,
        "intermediate_size": 2560,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 16384,
        "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}


def config_of(name: str) -> Any:
    """The config of a preset."""
    from transformers import LlamaConfig

    return LlamaConfig(**PRESETS[name], max_position_embeddings=8192)


def build(name: str, dtype: "torch.dtype", device: "torch.device") -> Any:
    """A model of that size, made where it will run."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model: Any = LlamaForCausalLM(config_of(name))
    finally:
        torch.set_default_dtype(before)
    return model.eval()
