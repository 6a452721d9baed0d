"""A row of a sequence classifier is done once its pooled token has left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch import Tensor

from classify import draw, inputs, last, padded, pair, run, run_oracle, stopped
from oracle import assert_close, assert_same, depths
from product import EXITS, LAYERS, PLANS, set_up
from strategies import examples

LENGTHS = (9, 3, 7, 1, 9)
TYPES = ("llama", "gpt2", "opt", "bloom", "qwen2", "gemma3_text", "gpt_neox")


def check(model_type: str, given: dict[str, Any], wants: Tensor, real: Tensor, pooled: Tensor):
    """Logits by the plain oracle; hidden states and depths by one whose rows leave as a whole."""
    model, ee = pair(model_type)
    ends = stopped(wants, real, pooled)
    want, _, depth = run_oracle(model, given, wants, real)
    _, hidden, ended = run_oracle(model, given, ends, real)
    seen = []
    for plan in PLANS:
        what = f"{model_type} plan={plan}"
        set_up(ee, [wants.float()], plan)
        ee.adept.stats.reset()
        got, states = run(ee, ee.adept.decoder, given)
        assert got.past_key_values is None, what
        assert_close(got.logits, want.logits, f"{what} logits")
        assert_close(states[real], hidden[real], f"{what} hidden states")
        assert torch.equal(ee.adept.last_depth, ended), what
        seen.append(ee.adept.stats.as_dict())
    check_stats(seen, ended, depth, real)


def check_stats(seen: list[dict[str, Any]], ended: Tensor, depth: Tensor, real: Tensor) -> None:
    """Each exit's gate saw the tokens still there, and counts those that it let go itself."""
    phase = "prefill" if real.shape[1] > 1 else "decode"
    for counts, plan in zip(seen, PLANS, strict=True):
        found = counts[phase]
        assert found["seen"] == [int(real.sum()), int((ended > EXITS[0]).sum())], plan
        both = [int(((ended == count) & (depth == count)).sum()) for count in EXITS]
        assert found["exited"] == both, plan
        assert found["total"] == LAYERS * int(real.sum())
        assert found["needed"] == int(ended.sum()) <= found["executed"]
        if plan == "dense":
            assert found["executed"] == found["total"]
        if plan == "compact":
            assert found["executed"] == found["needed"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", TYPES)
def test_rows_end_with_their_pooled_token(model_type: str, side: str) -> None:
    real = padded(LENGTHS, side, columns=11)
    wants, pooled = draw(real, seed=2), last(real)
    assert set(depths(wants, EXITS, LAYERS, real)[pooled].tolist()) == {*EXITS, LAYERS}
    check(model_type, inputs(model_type, real), wants, real, pooled)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_calls_without_a_mask(model_type: str) -> None:
    real = torch.ones(4, 6, dtype=torch.bool)
    ids = inputs(model_type, real)["input_ids"]
    check(model_type, {"input_ids": ids}, draw(real), real, last(real))


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_embeddings_without_ids(model_type: str) -> None:
    """Then the head pools the last column, whatever the mask says."""
    model, _ = pair(model_type)
    real = padded(LENGTHS, "left", columns=10)
    given: dict[str, Any] = inputs(model_type, real)
    given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids")).detach()
    check(model_type, given, draw(real, seed=1), real, last(real))


def test_a_pooled_pad_ends_nothing() -> None:
    """Padding never leaves: its row runs like any other."""
    model, ee = pair("llama")
    real = padded((5, 2, 3), "right", columns=5)
    given: dict[str, Any] = inputs("llama", real)
    given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids")).detach()
    wants = draw(real, 0.4, seed=2)
    wants[:, 2] = False
    pooled = real.clone()
    pooled[0] = last(real)[0]  # the one row whose last column is real
    for plan in PLANS:
        set_up(ee, [wants.float()], plan)
        run(ee, ee.adept.decoder, given)
        ended = run_oracle(model, given, stopped(wants, real, pooled), real)[2]
        assert torch.equal(ee.adept.last_depth, ended)


def test_the_pad_token_is_the_configs_of_now() -> None:
    """And the head's affair: here it follows a pad token that the texts are full of."""
    model, ee = pair("llama")
    real = torch.ones(2, 6, dtype=torch.bool)
    ids = torch.tensor([[5, 6, 7, 9, 9, 9], [9, 5, 9, 6, 7, 9]])
    pooled = torch.zeros_like(real)
    pooled[0, 2] = pooled[1, 4] = True
    wants = torch.zeros(2, 2, 6, dtype=torch.bool)
    wants[0] = pooled
    wants[1] = True
    try:
        model.config.pad_token_id = ee.config.pad_token_id = 9
        check("llama", {"input_ids": ids}, wants, real, pooled)
    finally:
        model.config.pad_token_id = ee.config.pad_token_id = 0


def test_no_pad_token() -> None:
    """A batch of one needs none; of several, the head says what it always says."""
    model, ee = pair("gpt2")
    real = torch.ones(1, 5, dtype=torch.bool)
    given = inputs("gpt2", real)
    wants = torch.zeros(2, 1, 5, dtype=torch.bool)
    wants[0, 0, 1] = wants[1, 0, 4] = True
    try:
        model.config.pad_token_id = ee.config.pad_token_id = None
        check("gpt2", given, wants, real, last(real))
        two = {name: value.repeat(2, 1) for name, value in given.items()}
        set_up(ee, [wants.repeat(1, 2, 1).float()], "auto")
        with pytest.raises(ValueError, match="no padding token"):
            ee(**two)
    finally:
        model.config.pad_token_id = ee.config.pad_token_id = 0


@examples(25)
@drawn(st.data())
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text"])
def test_any_batch(model_type: str, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    columns = max(lengths) + data.draw(st.sampled_from((0, 2)))
    real = padded(lengths, data.draw(st.sampled_from(("left", "right"))), columns)
    seed = data.draw(st.integers(0, 1_000_000))
    wants = draw(real, data.draw(st.sampled_from((0.1, 0.4, 0.8, 1.0))), seed)
    check(model_type, inputs(model_type, real, seed), wants, real, last(real))


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom"])
def test_tokens_of_token_classifiers_leave_alone(model_type: str) -> None:
    """Every token's logits count: nothing ends a row."""
    model, ee = pair(model_type, "tokens")
    real = padded(LENGTHS, "left", columns=10)
    given, wants = inputs(model_type, real), draw(real, seed=4)
    want, _, depth = run_oracle(model, given, wants, real)
    for plan in PLANS:
        set_up(ee, [wants.float()], plan)
        got = ee(**given)
        assert_close(got.logits[real], want.logits[real], f"{model_type} tokens {plan}")
        assert torch.equal(ee.adept.last_depth, depth)
    set_up(ee, [wants.float()], "dense", threshold=1.0)
    assert_same(ee(**given).logits[real], model(**given).logits[real], "never")
