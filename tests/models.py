"""Tiny, seeded, really mixing models of every supported family, built from configs alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB = 128
WINDOW = 6  # of the sliding layers: shorter than most texts of the tests

_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 4}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
_NEOX: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_OPT: dict[str, Any] = {
    "hidden_size": 32,
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "dropout": 0.0,
}
_GPT2: dict[str, Any] = {
    "n_embd": 32,
    "n_head": 4,
    "n_positions": 128,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_DEEPSEEK: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}

_TIED_NORMS = ("ln_f.weight", "decoder.final_layer_norm.weight")

_FIELDS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 8},
    "mistral": {**_LLAMA, "sliding_window": WINDOW},
    "gemma3_text": {
        **_LLAMA,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": WINDOW,
        "layer_types": ("sliding_attention", "full_attention"),  # repeated
    },
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "opt": _OPT,
    "bloom": {"hidden_size": 32, "n_head": 4},
    "phi3": _LLAMA,
    "olmo2": _LLAMA,
    "cohere": {**_LLAMA, "logit_scale": 0.25},
    "mixtral": {**_LLAMA, **_EXPERTS},
    "qwen3_moe": {
        **_LLAMA,
        "head_dim": 8,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "gpt_oss": {
        **_LLAMA,
        **_EXPERTS,
        "head_dim": 8,
        "sliding_window": WINDOW,
        "layer_types": ("sliding_attention", "full_attention"),  # repeated
        "rope_parameters": _YARN,
    },
    "deepseek_v3": _DEEPSEEK,
}

MODEL_TYPES: tuple[str, ...] = tuple(_FIELDS)
MOE_TYPES: tuple[str, ...] = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
DENSE_TYPES: tuple[str, ...] = tuple(t for t in MODEL_TYPES if t not in MOE_TYPES)
SLIDING_TYPES: tuple[str, ...] = ("mistral", "gemma3_text", "gpt_oss")
# The original itself cannot run on a StaticCache (bloom's alibi is as long as the mask).
STATIC_TYPES: tuple[str, ...] = tuple(t for t in MODEL_TYPES if t != "bloom")


def tiny_config(model_type: str, layers: int = 4, **overrides: Any) -> PreTrainedConfig:
    """The config of `tiny`; `overrides` are config fields."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "num_hidden_layers": layers,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **_FIELDS[model_type],
        **overrides,
    }
    kinds = fields.get("layer_types")
    if isinstance(kinds, tuple):
        fields["layer_types"] = [kinds[i % len(kinds)] for i in range(layers)]
    return AutoConfig.for_model(model_type, **fields)


def tiny(
    model_type: str,
    dtype: torch.dtype = torch.float32,
    layers: int = 4,
    *,
    seed: int = 0,
    attn_implementation: str | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """A seeded causal LM in eval mode, whose layers change the hidden state by its own size.

    The weights of two dtypes are the same up to rounding. Generation never meets an end token.
    """
    config = tiny_config(model_type, layers, **overrides)
    extra = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **extra).eval()
    randomize(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return _cast(model, dtype)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Casts the parameters as loading a checkpoint does: rotary frequencies stay in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and "inv_freq" not in name and "correction" not in name:
            buffer.data = buffer.data.to(dtype)
    model.config.dtype = dtype
    return model


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int) -> None:
    """Draws every parameter so that each sublayer's output has the size of its input."""
    generator = torch.Generator().manual_seed(1000 + seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.add_(0.1 * noise)  # biases, and gains around what they start from
            if name.endswith(_TIED_NORMS):  # or a tied head only ever repeats the last token
                parameter.mul_(noise.sign())
        elif id(parameter) in embeddings:
            parameter.copy_(0.5 * noise / _embedding_scale(model, name))
        else:
            parameter.copy_(1.3 * noise / _fan_in(parameter) ** 0.5)
    for name, buffer in sorted(model.named_buffers()):
        if "correction_bias" in name:
            buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))


def _fan_in(parameter: torch.Tensor) -> int:
    return min(parameter.shape[-2:]) if parameter.dim() == 3 else parameter.shape[-1]


def _embedding_scale(model: PreTrainedModel, name: str) -> float:
    """Gemma multiplies embeddings by sqrt(width) itself."""
    scaled = model.config.model_type.startswith("gemma") and "embed" in name
    return model.config.hidden_size**0.5 if scaled else 1.0
