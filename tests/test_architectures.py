"""Layers that keep or pass on more than keys and values equal the masked-dense oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adept_fx.errors import AdeptError
from adept_fx.graph.blocks import AttentionRegion, MixerRegion
from adept_fx.ops import tokens as ops
from dialogue import Case, play, script
from hybrids import CASE, SIZES, cases, check_exits, check_never, leaving, moody, raw, rewritten
from oracle import held
from product import set_up
from strategies import examples

every_type = pytest.mark.parametrize("model_type", SIZES)
recurrent = pytest.mark.parametrize("model_type", ["qwen3_next", "lfm2", "jamba"])


@every_type
def test_any_exits_are_the_oracles(model_type: str) -> None:
    for name, spoken in cases(model_type).items():
        check_exits(model_type, spoken, name)


@every_type
def test_never_exits_is_the_original(model_type: str) -> None:
    for name, spoken in cases(model_type).items():
        check_never(model_type, spoken, name)


KEPT: dict[str, list[set[str]]] = {
    "qwen3_next": [{"conv_states 0", "recurrent_states 0"}, {"keys", "values"}],
    "lfm2": [{"keys", "values"}, {"conv_states 0"}],
    "jamba": [{"conv_states 0", "recurrent_states 0"}, {"keys", "values"}],
    "gemma4_text": [{"keys", "values"}] * 2,
    "deepseek_v32": [{"keys", "values", "indexer_keys"}] * 2,
}


@pytest.mark.parametrize("model_type", KEPT)
def test_the_models_keep_what_they_are_chosen_for(model_type: str) -> None:
    spoken = script(replace(CASE, lengths=(4, 4)), len(SIZES[model_type][1]))
    cache, seen = play(raw(model_type), spoken).cache, spoken.turns[-1].seen
    found = [set(held(cache, layer, seen)) for layer in range(len(cache.layers))]
    assert found[: len(KEPT[model_type])] == KEPT[model_type]


@recurrent
def test_mixers_run_as_a_whole_and_own_nothing(model_type: str) -> None:
    graph = rewritten(model_type).adept.graph
    regions = [m for m in graph.modules() if isinstance(m, MixerRegion)]
    kinds = raw(model_type).config.layer_types
    assert len(regions) == sum(kind.removeprefix("full_") != "attention" for kind in kinds)
    assert not list(graph.parameters())


@recurrent
def test_a_state_that_skipped_stages_left_behind_serves_the_next_token(model_type: str) -> None:
    """All leave at the first exit, again and again; then one goes through all layers."""
    moods = ("first", "first", "first", "stay")
    check_exits(model_type, moody(replace(CASE, seed=7), len(SIZES[model_type][1]), moods), "late")


@examples(12)
@given(data=st.data())
def test_any_exit_pattern_is_the_oracles(data: st.DataObject) -> None:
    lengths = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    case = Case(lengths=lengths, chunk=data.draw(st.sampled_from((0, 3))), steps=3)
    spoken = script(case, len(SIZES["lfm2"][1]))
    bits = st.integers(0, 2**31 - 1)
    wants = []
    for scores in spoken.scores:
        generator = torch.Generator().manual_seed(data.draw(bits))
        chance = data.draw(st.sampled_from((0.0, 0.3, 0.7, 1.0)))
        wants.append(torch.rand(scores.shape, generator=generator) < chance)
    check_exits("lfm2", leaving(spoken, wants), f"wants={wants}")


def test_shared_keys_are_read_by_later_stages() -> None:
    graph = rewritten("gemma4_text").adept.graph
    last = graph.get_submodule("stage_2.graph").graph
    assert len(last.find_nodes(op="call_function", target=ops.read_cache)) == 2
    assert not last.find_nodes(op="call_function", target=ops.write_cache)


# The state and what layers behind the exit read: two rotary tables per kind, a piece per layer.
GATHERED = {"pieces": 6 + (3 + 2) + (3 + 1), "gemma4_text": 9 + (1 + 4 + 3) + (1 + 2 + 1)}


@pytest.mark.parametrize("model_type", GATHERED)
def test_values_made_before_the_layers_are_gathered(model_type: str) -> None:
    adept = rewritten(model_type).adept
    inputs = [node.name for node in adept.graph.graph.find_nodes(op="placeholder")]
    assert {"input_ids", "inputs_embeds"} <= set(inputs)
    gathered = adept.graph.graph.find_nodes(op="call_function", target=ops.gather_tokens)
    assert len(gathered) == GATHERED[model_type]


def test_a_call_with_embeddings_alone_is_refused_where_ids_are_read() -> None:
    model, ee = raw("pieces"), rewritten("pieces")
    ids = torch.tensor([[5, 6, 7]])
    given = {"position_ids": torch.arange(3)[None]}
    set_up(ee, [torch.zeros(2, 1, 3)], "dense")
    with pytest.raises(AdeptError, match="Prepared"):
        ee(inputs_embeds=model.get_input_embeddings()(ids), **given)
    assert torch.equal(ee(ids, **given).logits, model(ids, **given).logits)


def test_index_keys_come_behind_cached_keys() -> None:
    graph: Any = rewritten("deepseek_v32").adept.graph
    regions = [m for m in graph.modules() if isinstance(m, AttentionRegion)]
    assert len(regions) == SIZES["deepseek_v32"][0]
    for region in regions:
        values = [n.meta["val"] for n in region.graph.graph.find_nodes(op="placeholder")]
        cached = [v for v, kind in zip(values, region.kinds, strict=True) if kind == "cached"]
        assert [value.ndim for value in cached] == [4, 4, 3]
        assert region.kinds[:3] == ["cached"] * 3


def test_a_layer_that_attends_twice_returns_two_values() -> None:
    graph = rewritten("diffllama").adept.graph
    regions = [m for m in graph.modules() if isinstance(m, AttentionRegion)]
    assert [len(region.output) for region in regions] == [2, 2, 2]


def test_key_lengths_are_inputs_where_the_decoder_counts_keys_itself() -> None:
    inputs = rewritten("gpt_neo").adept.graph.graph.find_nodes(op="placeholder")
    assert any(node.name.startswith("slots_") for node in inputs)
