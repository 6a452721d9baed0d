"""What compiled stages are made of: shared graphs, plain inputs, masks and heads left out."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import adept_fx
from adept_fx.bench import recompiles
from adept_fx.bench.presets import build
from adept_fx.bench.runner import Setting
from adept_fx.gates import MLP, Linear
from adept_fx.graph.blocks import Stage
from adept_fx.lower.forms import Forms, plain
from adept_fx.lower.graph import lower, slot_names
from adept_fx.lower.masks import fills, known_keys, prompt_keys, slices_keys, visible_keys
from adept_fx.lower.program import compile_options
from adept_fx.lower.share import gate_kind, signature
from adept_fx.ops.attention import AttentionCall, packed_attention, packs
from models import tiny


def _stages(model_type: str) -> tuple[Any, list[Stage]]:
    ee = adept_fx.transform(tiny(model_type), adept_fx.ExitConfig(exits=(1, 2, 3)))
    return ee, [b for b in ee.adept.graph.children() if isinstance(b, Stage)]


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_equal_stages_are_compiled_once(model_type: str) -> None:
    """Whatever their numbers."""
    _, stages = _stages(model_type)
    found = [signature(lower(stage, freeze=False)) for stage in stages]
    assert found[0] is not None
    assert found.count(found[0]) == len(stages)


def test_an_attention_function_of_the_model_s_own_is_not_shared() -> None:
    """It may read parameters of its module: GPT-OSS reads its sinks."""
    model = tiny("llama")
    model.set_attn_implementation("eager")
    ee = adept_fx.transform(model, adept_fx.ExitConfig(exits=(1, 2, 3)))
    stages = [b for b in ee.adept.graph.children() if isinstance(b, Stage)]
    assert {signature(lower(stage, freeze=False)) for stage in stages} == {None}


def test_slots_are_numbered_within_their_stage() -> None:
    _, stages = _stages("llama")
    assert [slot_names(stage) for stage in stages][2] == {"kv_2": "kv_0"}


def test_gates_of_one_kind() -> None:
    assert gate_kind(MLP(8)) == gate_kind(MLP(8))
    assert gate_kind(MLP(8)) != gate_kind(MLP(8, width=4))
    assert gate_kind(MLP(8)) != gate_kind(Linear(8))


def test_plain_tensors() -> None:
    whole = torch.randn(4, 1, 6)
    for view in (whole[1:2], whole.expand(4, 3, 6), whole.transpose(0, 2), whole[:, :, ::2]):
        with torch.no_grad():
            found = plain(view)
        assert torch.equal(found, view)
        assert not found._is_view()
        assert found.stride() == torch.empty(view.shape).stride()
    weight = nn.Parameter(torch.randn(3, 2))
    assert plain(weight) is weight
    assert plain(None) is None
    assert plain(whole) is whole


def test_a_graph_is_compiled_apart_for_sizes_of_one() -> None:
    graph = torch.fx.symbolic_trace(nn.Linear(9000, 2))
    forms = Forms(graph, {"backend": "eager", "dynamic": True})
    for size in (1, 4, 7, 1):
        assert forms(torch.randn(size, 9000)).shape == (size, 2)
    assert len(forms._made) == 2


def test_small_inputs_are_not_worth_compiled_code() -> None:
    graph = torch.fx.symbolic_trace(lambda x, w: x @ w)
    forms = Forms(graph, {"backend": "eager", "dynamic": True}, own=1)
    assert forms(torch.randn(2, 100), torch.randn(100, 1000)).shape == (2, 1000)
    assert not forms._made
    assert forms(torch.randn(200, 100), torch.randn(100, 3)).shape == (200, 3)
    assert len(forms._made) == 1


def test_masks_that_allow_every_key_are_left_out() -> None:
    model = tiny("llama")
    cache = StaticCache(config=model.config, max_cache_len=8)
    model(torch.ones(2, 4, dtype=torch.long), past_key_values=cache)
    allows = torch.tensor([True] * 5 + [False] * 3).expand(2, 1, 1, 8)
    assert visible_keys([allows], cache, 1) == 5
    assert visible_keys([torch.where(allows, 0.0, -1e9)], cache, 1) == 5
    assert visible_keys([allows], cache, 2) is None
    assert visible_keys([None], cache, 1) is None
    assert visible_keys([allows], None, 1) is None
    holes = allows.clone()
    holes[0, 0, 0, 1] = False
    assert visible_keys([allows, holes], cache, 1) is None
    assert not fills([allows], 5)
    assert fills([allows], 8)


def test_masks_are_left_out_only_where_attention_alone_reads_them() -> None:
    ee = adept_fx.transform(tiny("llama"), adept_fx.ExitConfig(exits=(2,)))
    program = ee.adept._forward.prepare()
    (name,) = program.masks
    assert program.slices_keys
    assert slices_keys(program.graph, [name])
    stage = program.graph.get_submodule("stage_1")
    assert isinstance(stage, Stage)
    for graph in (program.graph.graph, stage.graph.graph):
        (mask,) = [n for n in graph.find_nodes(op="placeholder") if "mask" in n.name]
        with graph.inserting_before(next(iter(graph.find_nodes(op="output")))):
            other = graph.call_function(torch.logical_not, (mask,))
        assert not slices_keys(program.graph, [name])
        graph.erase_node(other)
        assert slices_keys(program.graph, [name])
    bloom = adept_fx.transform(tiny("bloom"), adept_fx.ExitConfig(exits=(2,)))
    assert not bloom.adept._forward.prepare().slices_keys


@pytest.mark.parametrize("masked", [False, True])
def test_packed_heads_give_what_transformers_computes(masked: bool) -> None:
    module: Any = SimpleNamespace(num_key_value_groups=3, is_causal=True, training=False)
    call = AttentionCall(sdpa_attention_forward, module, {"scaling": 0.3, "dropout": 0.0})
    query, key = torch.randn(2, 6, 1, 4), torch.randn(2, 2, 5, 4)
    value = torch.randn(2, 2, 5, 8)
    mask = torch.rand(2, 1, 1, 5) > 0.3 if masked else None
    expected = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)[0]
    assert packs(call, query, mask)
    assert torch.allclose(packed_attention(call, query, key, value, mask), expected, atol=1e-6)
    assert not packs(call, torch.randn(2, 6, 2, 4), mask)
    assert not packs(call, query, torch.ones(2, 6, 1, 5, dtype=torch.bool))
    capped = AttentionCall(sdpa_attention_forward, module, {"softcap": 3.0})
    assert not packs(capped, query, mask)


def _call(tokens: int, cache: Any, mask: Any = None) -> Any:
    embeds = torch.zeros(2, tokens, 4)
    return SimpleNamespace(embeds=embeds, cache=cache, attention_mask=mask)


def test_masks_that_would_allow_every_key_are_not_built() -> None:
    model = tiny("gemma3_text", sliding_window=6)
    cache = StaticCache(config=model.config, max_cache_len=8)
    with torch.no_grad():
        model(torch.ones(2, 4, dtype=torch.long), past_key_values=cache)
    adept = adept_fx.transform(model, adept_fx.ExitConfig(exits=(2,))).adept
    program = adept._forward.prepare()
    masks, kinds = list(program.masks.values()), program.kind_layers
    assert len(masks) == 2
    assert known_keys(masks, _call(1, cache), kinds) == 5
    ones = torch.ones(2, 5, dtype=torch.long)
    assert known_keys(masks, _call(1, cache, ones), kinds) == 5
    padded = ones.clone()
    padded[0, 0] = 0
    for mask in (padded, ones[:, :4], ones[:, None, None].bool()):
        assert known_keys(masks, _call(1, cache, mask), kinds) is None
    assert known_keys(masks, _call(2, cache), kinds) is None
    assert known_keys(masks, _call(1, None), kinds) is None
    assert known_keys(masks, _call(1, DynamicCache(config=model.config)), kinds) is None
    changed = replace(masks[0], keywords=masks[0].keywords | {"or_mask_function": print})
    assert known_keys([changed, *masks[1:]], _call(1, cache), kinds) is None
    with torch.no_grad():
        model(torch.ones(2, 1, dtype=torch.long), past_key_values=cache)
    # The window is full: the next key pushes one out.
    assert known_keys(masks, _call(1, cache), kinds) is None


def test_whole_prompts_see_no_empty_place() -> None:
    config = tiny("llama").config
    static = StaticCache(config=config, max_cache_len=8)
    assert prompt_keys([None], static, 4) == 4
    assert prompt_keys([torch.ones(1, 1, 4, 8)], static, 4) is None
    assert prompt_keys([None], static, 1) is None
    assert prompt_keys([None], None, 4) is None
    assert prompt_keys([None], DynamicCache(config=config), 4) is None


def test_options() -> None:
    assert compile_options(None, {"backend": "eager"}) == {"dynamic": True, "backend": "eager"}
    found = compile_options("max-autotune-no-cudagraphs", {})
    assert found["options"]["max_autotune"]
    assert "mode" not in found
    assert compile_options(None, {"dynamic": False})["dynamic"] is False


@pytest.mark.slow
def test_nothing_is_compiled_after_the_warm_up() -> None:
    """500 steps with random exits at batch sizes 1 to 8."""
    model = build("tiny", torch.float32, torch.device("cpu"))
    found = recompiles.count(model, Setting(exits=(2, 4, 6)), backend="eager")
    assert found["compiled"] < 60
    assert found["graphs"] == 0
    assert found["steps"] == 500
