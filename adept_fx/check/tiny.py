"""Tiny configs of any model type, from the names and values of config fields alone.

A default config is read, every size in it is replaced by a small one, and what has one entry per
layer is drawn from the default's own variety: of a model with sliding and full attention, every
second layer is sliding.
"""

import re
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

LAYERS = 4
VOCAB = 128
_HEADS, _KV_HEADS, _HEAD_DIM, _ROTARY_DIM = 4, 2, 8, 4
_HIDDEN, _WIDE, _NARROW = 32, 48, 16
_EXPERTS, _CHOSEN = 4, 2
_STACK = 2

_LAYER_COUNT = r"num_hidden_layers|n_layers?|num_layers|(num_)?(decoder|encoder)_layers"
# First match wins. A field is changed only if the default config has it, as a number of that type.
_SIZES: tuple[tuple[str, int | float], ...] = (
    (r"depth", 2),
    (r"num_layers_per_stack", _STACK),
    (r".*vocab_size.*", VOCAB),
    (r"(.*_)?num_(attention_)?heads|(.*_)?n_heads?|.*attention_heads", _HEADS),
    (
        r"(hidden_size|d_model|d_embed|n_embd|dim|word_embed_proj_dim|embedding_size|emb_dim)",
        _HIDDEN,
    ),
    (r"(mamba_expand|expand)", 1),
    (r"mamba_d_ssm|adapter_in_dim", _HIDDEN),
    (r"(mamba_n_groups|n_groups|mamba_ngroups)", 1),
    (r"qk_rope_head_dim|rotary_dim", _ROTARY_DIM),
    (r"qk_head_dim", _HEAD_DIM + _ROTARY_DIM),
    (r"(.*head_dim|.*_d_head|d_kv|attention_head_size|kv_channels)", _HEAD_DIM),
    (r".*_rank", _NARROW),
    (r".*(intermediate|ffn|inner|mlp|expert)_?(hidden)?_?(size|dim).*|n_inner|d_ff", _WIDE),
    (
        r"(num_|n_)?(routed_|local_)?experts|(moe_)?num_(routed_)?experts|num_local_experts",
        _EXPERTS,
    ),
    (r"(n|num)(_expert)?_groups?", 2),
    (r"topk_group", 1),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq(uence)?_len(gth)?)", 128),
    (r"(.*sliding_window.*|window_size|attention_chunk_size)", 6),
    (r"(.*dropout.*|.*_pdrop|.*layerdrop)", 0.0),
    (r"(attn|expert)_layer_period", 2),
    (r"(attn|expert)_layer_offset", 1),
    (r"num_kv_shared_layers", 2),
    (r"hidden_size_per_layer_input", _HEAD_DIM),
    (r"index_topk", 4),
    (r"index_(block_size|topk_blocks)", 2),
    (r"zero_expert_num", 2),
    (r"first_k_dense_replace", 1),
    (r"pad_token_id", 0),
    (r"(.*_)?(bos|decoder_start)_token_id", 1),
    (r"eos_token_id", 2),
)
# Sizes that a default leaves to be derived from others, which then do not fit.
_UNSET: dict[str, int] = {
    "head_dim": _HEAD_DIM,
    "num_key_value_heads": _HEADS,
    "n_routed_experts": _EXPERTS,
    "n_shared_experts": 1,
    "indexer_n_heads": _HEADS,
    "indexer_kv_heads": 1,
    "indexer_head_dim": _HEAD_DIM,
    "indexer_budget": 4,
    "indexer_compress_ratio": 1,
    "num_experts_per_tok": _CHOSEN,
}
_KV_NAMES = r"(num_key_value_heads|n_kv_heads?|num_kv_heads|kv_n_heads|swa_num_key_value_heads)"
_CHOSEN_NAMES = r"(.*experts_per_tok(en)?|(moe_)?top_?k|moe_k)"


def tiny_config(model_type: str, layers: int = LAYERS) -> PreTrainedConfig:
    """A tiny config of a model type.

    Args:
        model_type: A key of transformers' config mapping.
        layers: Number of layers.
    """
    default = AutoConfig.for_model(model_type)
    return type(default)(**_shrunken(default, layers))


def _shrunken(default: PreTrainedConfig, layers: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    count = getattr(default, "num_hidden_layers", None)
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = _shrunken(value, layers)
        elif name == "attn_layer_indices":
            fields[name] = list(range(1, layers, 2))
        elif name == "axial_pos_embds_dim":
            fields[name] = [_HIDDEN // 2, _HIDDEN // 2]
        elif name == "rope_parameters" and not value and getattr(default, "layer_types", None):
            rope = {"rope_type": "default", "rope_theta": 10000.0}
            fields[name] = {kind: dict(rope) for kind in sorted(set(default.layer_types))}
        elif isinstance(value, (list, tuple)) or name == "layer_types":
            listed = list(value or ())
            if name == "layer_types" or (len(listed) == count and count > layers):
                fields[name] = _varied(_kinds(name, listed, default), layers)
        else:
            size = _size(name, value, default, layers)
            if size is not None:
                fields[name] = size
    if hasattr(default, "is_decoder"):
        fields["is_decoder"] = True
    if vars(default).get("languages"):
        fields["default_language"] = default.languages[0]
    return fields


def _size(name: str, value: Any, default: Any, layers: int) -> Any:
    if value is None:
        return _UNSET.get(name)
    if isinstance(value, (bool, str, dict)):
        return None
    if re.fullmatch(_LAYER_COUNT, name):
        stack = vars(default).get("num_layers_per_stack")
        return layers if stack is None else value // stack * _STACK
    rotary = vars(default).get("qk_rope_head_dim")
    if name == "head_dim" and rotary:
        return max(1, value // rotary) * _ROTARY_DIM  # the rotary part of it stays that part
    if re.fullmatch(_KV_NAMES, name):
        heads = vars(default).get("num_attention_heads")
        return _HEADS if value == heads else min(value, _KV_HEADS)
    if re.fullmatch(_CHOSEN_NAMES, name):
        return min(value, _CHOSEN)
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, name):
            return size if isinstance(size, type(value)) else None
    return None


def _kinds(name: str, values: list[Any], default: Any) -> list[Any]:
    """The different entries of a per-layer list, in order of appearance.

    A default with one kind of layer may have fields for another: those of its siblings.
    """
    kinds: list[Any] = []
    for value in values:
        if value not in kinds:
            kinds.append(value)
    if name == "layer_types" and len(kinds) == 1:
        named = vars(default).get("rope_parameters") or {}
        kinds += [kind for kind in named if kind.endswith("_attention") and kind not in kinds]
    if name == "layer_types" and len(kinds) < 2:
        kinds += ["conv"] if "conv_L_cache" in vars(default) else []
    if name == "layer_types" and set(kinds) <= {"conv", "linear_attention"}:
        kinds.append("full_attention")
    return kinds


def _varied(kinds: list[Any], layers: int) -> list[Any]:
    return [kinds[at % len(kinds)] for at in range(layers)]
