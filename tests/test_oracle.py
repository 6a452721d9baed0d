"""The oracle itself, and the originals that it stands on: no adept_fx in here."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dialogue import (
    Case,
    assert_trace_equal,
    joined,
    joined_script,
    play,
    play_oracle,
    script,
)
from models import DENSE_TYPES, MODEL_TYPES, STATIC_TYPES, tiny
from oracle import (
    Oracle,
    assert_close,
    assert_row_equal,
    cut,
    decoder_layers,
    depths,
    exact,
    visible_cache,
)

EXITS = (1, 3)
CASE = Case(lengths=(9, 4, 1), side="left", extra=1, steps=4)
every_type = pytest.mark.parametrize("model_type", MODEL_TYPES)


@cache
def raw(model_type: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return tiny(model_type, dtype)


def cases(model_type: str) -> list[Case]:
    caches = ("dynamic", "static") if model_type in STATIC_TYPES else ("dynamic",)
    found = [replace(CASE, cache=c, head=c == "static") for c in caches]
    return [*found, replace(CASE, side="right", extra=0), replace(CASE, cache="none")]


@every_type
def test_tiny_models_really_compute(model_type: str) -> None:
    model = raw(model_type)
    spoken = script(Case(lengths=(12, 12), steps=0, head=False), len(EXITS))
    states: list[Tensor] = []

    def keep(module: object, args: object, out: Tensor | tuple[Tensor]) -> None:
        states.append(out[0] if isinstance(out, tuple) else out)

    handles = [layer.register_forward_hook(keep) for layer in decoder_layers(model)]
    play(model, spoken)
    for handle in handles:
        handle.remove()
    for before, after in itertools.pairwise(states):
        change = (after - before).std() / before.std()
        assert 0.3 < change < 3, f"{model_type}: a layer changes the state by {change:.2f}"
    logits = play(model, script(Case(lengths=(12, 12), steps=0), len(EXITS))).outputs[0]
    assert logits.argmax(-1).unique().numel() > 8
    assert logits.std() > 0.3


def test_tiny_models_are_seeded() -> None:
    one, same, other = tiny("mixtral"), tiny("mixtral"), tiny("mixtral", seed=1)
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    half = tiny("mixtral", torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.lm_head.weight, one.lm_head.weight.bfloat16())


@every_type
def test_no_exits_is_the_plain_model(model_type: str) -> None:
    for case in cases(model_type):
        spoken = script(replace(case, leave=0.0), len(EXITS))
        spoken = replace(spoken, scores=[torch.zeros_like(s) for s in spoken.scores])
        got, want = play_oracle(raw(model_type), EXITS, spoken), play(raw(model_type), spoken)
        assert_trace_equal(got, want, spoken, f"{model_type} {case}", bitwise=True)
        for turn, depth in zip(spoken.turns, got.depths, strict=True):
            assert torch.equal(depth, turn.real * 4)


@every_type
@pytest.mark.parametrize("index", range(len(EXITS)))
def test_all_out_is_the_cut_model(model_type: str, index: int) -> None:
    short = cut(raw(model_type), EXITS[index])
    for case in cases(model_type):
        spoken = script(case, len(EXITS), out_at=index)
        got, want = play_oracle(raw(model_type), EXITS, spoken), play(short, spoken)
        label = f"{model_type} {case}"
        assert_trace_equal(got, want, spoken, label, bitwise=True, layers=EXITS[index])
        assert {int(d) for depth in got.depths for d in depth.unique()} <= {0, EXITS[index]}


@every_type
def test_a_row_of_a_batch_is_the_row_alone(model_type: str) -> None:
    for case in cases(model_type):
        spoken = script(case, len(EXITS))
        batch = joined(play_oracle(raw(model_type), EXITS, spoken))
        for row in range(len(case.lengths)):
            strip = case.side == "left" or case.steps == 0
            alone = spoken.row(row, strip)
            single = joined(play_oracle(raw(model_type), EXITS, alone))
            here, there = joined_script(spoken).turns[0], joined_script(alone).turns[0]
            label = f"{model_type} row={row} {case}"
            got, want = batch.outputs[0][row][here.real[row]], single.outputs[0][0][there.real[0]]
            assert_close(got, want, label)
            assert torch.equal(
                batch.depths[0][row][here.real[row]], single.depths[0][0][there.real[0]]
            )
            if case.cache != "none":
                assert_row_equal(batch.cache, here.seen, row, single.cache, there.seen, label)


@every_type
@pytest.mark.parametrize("chunk", [1, 4])
def test_a_chunked_prefill_is_the_whole_one(model_type: str, chunk: int) -> None:
    for case in cases(model_type):
        if case.cache == "none":
            continue
        whole, parts = (script(replace(case, chunk=c), len(EXITS)) for c in (0, chunk))
        want = joined(play_oracle(raw(model_type), EXITS, whole))
        got = joined(play_oracle(raw(model_type), EXITS, parts))
        assert_trace_equal(got, want, joined_script(whole), f"{model_type} {case}")


@every_type
def test_exits_matter_and_depths_agree(model_type: str) -> None:
    spoken = script(replace(CASE, leave=0.6, seed=3), len(EXITS))
    got, plain = play_oracle(raw(model_type), EXITS, spoken), play(raw(model_type), spoken)
    for want, turn, depth in zip(spoken.wants, spoken.turns, got.depths, strict=True):
        assert torch.equal(depth, depths(want, EXITS, 4, turn.real))
    with pytest.raises(AssertionError, match=r"layer=|turn="):
        assert_trace_equal(got, plain, spoken, model_type)


def test_an_exited_token_caches_what_the_layer_makes_of_its_frozen_state() -> None:
    model, spoken = raw("llama"), script(replace(CASE, steps=0), 1, out_at=0)
    states: list[Tensor] = []
    layers: Any = decoder_layers(model)
    handle = layers[0].register_forward_hook(lambda m, a, out: states.append(out))
    cache = play_oracle(model, (1,), spoken).cache
    handle.remove()
    real = spoken.turns[0].real
    for index, layer in enumerate(layers):
        if index >= 1:
            value = layer.self_attn.v_proj(layer.input_layernorm(states[0]))
            value = value.view(*real.shape, -1, 8).transpose(1, 2)
            for row, (_, held) in enumerate(visible_cache(cache, index, real)):
                assert_close(held, value[row][:, real[row]], f"layer={index} row={row}")


@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_the_bf16_rule_accepts_the_oracle_and_rejects_another_model(model_type: str) -> None:
    model, spoken = raw(model_type, torch.bfloat16), script(CASE, len(EXITS))
    want, truth = (play_oracle(m, EXITS, spoken) for m in (model, exact(model)))
    assert want.outputs[0].dtype == torch.bfloat16
    assert_trace_equal(want, want, spoken, model_type, truth=truth)
    with pytest.raises(AssertionError, match="off by"):
        assert_trace_equal(play(model, spoken), want, spoken, model_type, truth=truth)


def test_the_oracle_leaves_no_hook_behind() -> None:
    model = raw("llama")
    wants, real = torch.ones(1, 1, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="inside"), Oracle(model, (2,)).exits_for(wants, real):
        raise RuntimeError("inside")
    assert not any(layer._forward_hooks for layer in decoder_layers(model))
