"""`adept_fx.explain`: numbers that are the model's own, the reason of every form, every note."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb
from transformers.models.llama.modeling_llama import eager_attention_forward as eager

import adept_fx
from adept_fx import ExitConfig
from adept_fx.check.tiny import tiny_config as any_config
from intact import IDS, intact
from models import WINDOW, tiny
from toys import NOTE, Layer, Toy, toy

EXIT = 1


def hybrid() -> Any:
    auto: Any = AutoModelForCausalLM
    config = any_config("qwen3_next", layers=2)
    config.layer_types = ["full_attention", "linear_attention"]
    config.mlp_only_layers = [0, 1]
    with torch.random.fork_rng(devices=[]):
        return auto.from_config(config, dtype=torch.float32).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny("llama", layers=3),
    "gemma3_text": lambda: tiny("gemma3_text", layers=2),
    "gpt_neox": lambda: tiny("gpt_neox", layers=2),
    "gpt2": lambda: tiny("gpt2", layers=2),
    "bloom": lambda: tiny("bloom", layers=2),
    "mixtral": lambda: tiny("mixtral", layers=2),
    "deepseek_v3": lambda: tiny("deepseek_v3", layers=2, first_k_dense_replace=2),
    "qwen3_next": hybrid,
}
# What still reads parameters of a layer that a token skips: which of its parameters, what part.
_LLAMA = {r"input_layernorm|self_attn\.[kv]_proj": 1.0}
KEPT: dict[str, dict[str, float]] = {
    "llama": _LLAMA,
    "gemma3_text": {r"input_layernorm|self_attn\.([kv]_proj|k_norm)": 1.0},
    "gpt_neox": {r"input_layernorm": 1.0, r"attention\.query_key_value": 2 / 3},
    "gpt2": {r"ln_1": 1.0, r"attn\.c_attn": 2 / 3},
    "bloom": {r"input_layernorm": 1.0, r"self_attention\.query_key_value": 2 / 3},
    "mixtral": _LLAMA,
    "deepseek_v3": {r"input_layernorm|self_attn\.kv_a_": 1.0},
    "qwen3_next": {r"input_layernorm|self_attn\.([kv]_proj|k_norm)|linear_attn": 1.0},
}

model = cache(lambda name: MODELS[name]())


@cache
def explained(name: str) -> Any:
    return adept_fx.explain(model(name), ExitConfig(exits=(EXIT,), gate="max_prob"))


def of_layer(name: str, index: int) -> dict[str, int]:
    """Sizes of a layer's parameters."""
    found = {}
    for path, parameter in model(name).get_decoder().named_parameters():
        head, _, rest = path.partition(f".{index}.")
        if head in ("layers", "h"):
            found[rest] = parameter.numel()
    return found


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_widths_are_those_of_the_cache(name: str) -> None:
    found = explained(name)
    cached = model(name)(IDS, past_key_values=DynamicCache(config=model(name).config))
    owed = {slot.layer: slot for slot in found.exits[0].slots}
    assert list(owed) == list(range(EXIT, found.num_layers))
    for layer, kept in zip(found.layers, cached.past_key_values.layers, strict=True):
        if "recurrent" in layer.kinds:
            assert layer.key is layer.value is None
            continue
        widths = tuple((item.shape[1], item.shape[3]) for item in (kept.keys, kept.values))
        assert (layer.key, layer.value) == widths
        assert layer.index < EXIT or (owed[layer.index].widths == widths)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_what_leaving_skips(name: str) -> None:
    found, decoder = explained(name), model(name).get_decoder()
    total = sum(parameter.numel() for parameter in decoder.parameters())
    sizes = [of_layer(name, index) for index in range(len(found.layers))]
    assert found.parameters == total
    assert [layer.parameters for layer in found.layers] == [sum(s.values()) for s in sizes]
    for stage, span in zip(found.stages, (sizes[:EXIT], sizes[EXIT:]), strict=True):
        assert stage.parameters == sum(sum(size.values()) for size in span)
    kept = [
        size * part
        for layer in sizes[EXIT:]
        for path, size in layer.items()
        for pattern, part in KEPT[name].items()
        if re.match(pattern, path)
    ]
    skipped = sum(sum(size.values()) for size in sizes[EXIT:]) - sum(kept)
    assert found.exits[0].skipped_parameters == pytest.approx(skipped)
    assert found.exits[0].skipped_share == pytest.approx(skipped / total)


def test_layers() -> None:
    llama, gemma = explained("llama"), explained("gemma3_text")
    assert (llama.model, llama.decoder) == ("LlamaForCausalLM", "LlamaModel")
    assert (llama.num_layers, llama.container, explained("gpt2").container) == (3, "layers", "h")
    assert {(layer.kinds, layer.window) for layer in llama.layers} == {(("full_attention",), None)}
    assert {layer.attention for layer in llama.layers} == {("sdpa_attention_forward",)}
    assert [(layer.kinds[0], layer.window) for layer in gemma.layers] == [
        ("sliding_attention", WINDOW),
        ("full_attention", None),
    ]
    assert [(stage.first, stage.last) for stage in llama.stages] == [(0, 0), (1, 2)]
    assert [stage.kinds for stage in llama.stages] == [{"full_attention": n} for n in (1, 2)]
    assert [s.kinds for s in gemma.stages] == [{"sliding_attention": 1}, {"full_attention": 1}]
    assert explained("deepseek_v3").layers[0].key != explained("deepseek_v3").layers[0].value


def test_modules_with_recurrent_state() -> None:
    found = explained("qwen3_next")
    mixer = type(model("qwen3_next").model.layers[1].linear_attn).__name__
    assert [layer.mixer for layer in found.layers] == [None, ("linear_attn", mixer)]
    assert [layer.kinds for layer in found.layers] == [("full_attention",), ("recurrent",)]
    (slot,) = found.exits[0].slots
    assert (slot.layer, slot.kind, slot.widths) == (1, "mixer_input", ((1, 32),))
    assert "recurrent modules of layer 1 run on all tokens" in str(found)


def forms(name: str) -> list[tuple[str, int, str, int, int]]:
    (found,) = explained(name).exits
    return [
        (item.weight.split(".")[-2], item.layers, item.form, item.computed, item.columns)
        for item in found.projections
    ]


def test_projections() -> None:
    assert forms("llama") == [("k_proj", 2, "merged", 16, 16), ("v_proj", 2, "merged", 16, 16)]
    assert forms("gpt_neox") == [("query_key_value", 1, "cut", 64, 96)]
    assert forms("gpt2") == [("c_attn", 1, "cut", 64, 96)]
    assert forms("deepseek_v3") == [("kv_a_proj_with_mqa", 1, "plain", 12, 12)]
    assert [item.reason for item in explained("llama").exits[0].projections] == ["", ""]
    assert explained("deepseek_v3").exits[0].projections[0].reason == "no other layer has one"
    assert "cut to 64 of 96 columns" in str(explained("gpt_neox"))


def test_what_crosses() -> None:
    rotary, mask = explained("llama").exits[0].crossing[:2], explained("llama").exits[0].crossing[2]
    assert {(v.shape, v.origin, v.layout) for v in rotary} == {
        (("B", 1, "S", 8), "prologue", "tokens")
    }
    assert (mask.shape, mask.origin, mask.layout) == (("B", 1, "S", "T"), "call", "rows")
    assert [value.layout for value in explained("gpt2").exits[0].crossing] == ["rows"]


def texts(found: Any) -> str:
    return "\n".join(f"{note.kind}: {note.text}" for note in found.notes)


class OddAttention(LlamaAttention):
    """Layer 0 lends its keys to the last layer, which has none; layer 3 has narrower ones."""

    def __init__(self, config: Any, at: int) -> None:
        super().__init__(config, at)
        if at == 3:
            width = config.hidden_size
            self.k_proj, self.v_proj = (nn.Linear(width, self.head_dim, bias=False) for _ in "kv")
            self.num_key_value_groups = config.num_attention_heads

    def forward(  # type: ignore[override]
        self, hidden_states: Any, position_embeddings: Any, lent: Any, **common: Any
    ) -> Any:
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        query, key, value = (
            part(hidden_states).view(shape).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if self.layer_idx == 4:
            key, value = lent["keys"]
        else:
            key, value = common["past_key_values"].update(key, value, self.layer_idx)
            lent.setdefault("keys", (key, value))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", eager)
        scaling = self.scaling
        mixed, _ = attend(self, query, key, value, common["attention_mask"], scaling=scaling)
        return self.o_proj(mixed.reshape(*hidden_states.shape[:2], -1)), None


class OddLayer(Layer):
    """Layer 0 makes a note for the later ones."""

    def __init__(self, config: Any, at: int) -> None:
        super().__init__(config, at)
        self.self_attn = OddAttention(config, at)

    def forward(self, hidden: Any, carried: Any, **common: Any) -> Any:  # type: ignore[override]
        state, _ = super().forward(hidden, carried, lent=carried, **common)
        note = carried.setdefault("note", carried["ids"] + self.gate(hidden))
        return self.read(state, note), carried


class Odd(Toy):
    """Reads `input_ids` besides their embedding."""

    layer_class = OddLayer

    def before(self, input_ids: Any, embeds: Any) -> Any:
        return {"ids": torch.sin(input_ids.unsqueeze(-1))}


@cache
def odd() -> Any:
    return adept_fx.explain(toy(Odd, layers=5), ExitConfig(exits=(1, 2), gate="cosine"))


def test_keys_of_an_earlier_layer() -> None:
    assert [layer.reads_keys_of for layer in odd().layers] == [(), (), (), (), (0,)]
    assert [layer.key for layer in odd().layers] == [(2, 8), (2, 8), (2, 8), (1, 8), None]
    assert [[slot.layer for slot in item.slots] for item in odd().exits] == [[1, 2, 3], [2, 3]]
    assert "reads the keys of layer 0" in str(odd())


def test_weights_of_several_shapes_are_not_merged() -> None:
    found = [(i.layers, i.form, i.columns, i.reason) for i in odd().exits[0].projections]
    reason = "the layers' weights differ in shape or dtype"
    assert sorted(found) == [(1, "plain", 8, reason)] * 2 + [(2, "merged", 16, "")] * 2
    found = [(i.layers, i.form, i.columns, i.reason) for i in odd().exits[1].projections]
    assert found == [(2, "plain", 16, reason)] * 2


def test_side_values_and_input_ids() -> None:
    for item in odd().exits:
        values = [value for value in item.crossing if value.shape == ("B", "S", NOTE)]
        assert [(value.origin, value.layout) for value in values] == [("layer 0", "tokens")]
    assert "refused: calls with inputs_embeds alone" in texts(odd())


def test_notes() -> None:
    head = model("llama").lm_head.weight.numel()
    assert texts(explained("llama")) == (
        f"slow: exit 1: the gate applies the head ({head:,} parameters) to each token"
    )
    own = texts(explained("bloom"))
    assert "slow: attention of layers 0..1 is the model's own code" in own
    assert "refused: attention masks that are not 2-D" in own


def test_masks_that_cannot_be_packed() -> None:
    flex = tiny("opt", layers=2, attn_implementation="flex_attention")
    found = adept_fx.explain(flex, ExitConfig(exits=(1,), gate="cosine"))
    assert "slow: masks of flex_attention attention cannot be packed" in texts(found)


def test_a_model_without_weights() -> None:
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        meta = auto.from_config(model("gpt2").config).eval()
    assert adept_fx.explain(meta, ExitConfig(exits=(EXIT,), gate="max_prob")) == explained("gpt2")


def test_the_model_and_its_surroundings_stay_as_they_are() -> None:
    gate = adept_fx.gates.MLP(32)
    random = torch.get_rng_state()
    with intact(model("gpt2")):
        found = adept_fx.explain(model("gpt2"), ExitConfig(exits=(1,), gate=gate))
        refused = adept_fx.explain(model("gpt2"), ExitConfig(exits=(2,), gate="mlp"))
    assert (found.accepted, refused.accepted) == (True, False)
    assert gate.training
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", MODELS)
def test_as_json(name: str) -> None:
    found = explained(name).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["accepted"] is True
    assert found["exits"][0]["skipped_share"] == explained(name).exits[0].skipped_share
