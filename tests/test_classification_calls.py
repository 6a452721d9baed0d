"""Caches, forms of a call, and training, of sequence classifiers whose rows end."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

import adept_fx
from classify import DEPTH, ENDED, LABELS, REAL, WANTS, draw, inputs, pair, ready, run_oracle
from oracle import Oracle, assert_cache_equal, assert_close, assert_same
from product import EXITS, PLANS, set_up


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [None, True, False])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "bloom", "gemma3_text"])
def test_where_nothing_may_leave_all_is_the_originals(
    model_type: str, use_cache: bool | None
) -> None:
    model, ee, given = ready(model_type, "dense", threshold=1.0)
    given |= {} if use_cache is None else {"use_cache": use_cache}
    want = model(**given)
    assert (want.past_key_values is None) == (use_cache is False)
    for disabled in (False, True):
        with ee.adept.disabled() if disabled else torch.no_grad():
            got = ee(**given)
        assert type(got) is type(want)
        assert_same(got.logits, want.logits, model_type)
        assert type(got.past_key_values) is type(want.past_key_values)
        if want.past_key_values is not None:
            assert_cache_equal(
                got.past_key_values, want.past_key_values, REAL, model_type, bitwise=True
            )


@torch.no_grad()
@pytest.mark.parametrize("cached", ["passed", "asked for"])
@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_who_wants_a_cache_gets_a_whole_one(model_type: str, cached: str) -> None:
    """No row ends early: later calls may attend to every token."""
    for plan in PLANS:
        model, ee, given = ready(model_type, plan)
        outputs = []
        for each in (model, ee):
            cache = DynamicCache(config=model.config)
            more = {"use_cache": True} if cached == "asked for" else {"past_key_values": cache}
            with Oracle(model, EXITS).exits_for(WANTS, REAL) if each is model else torch.no_grad():
                outputs.append(each(**given, **more))
        want, got = outputs
        assert_close(got.logits, want.logits, f"{model_type} {plan}")
        assert_cache_equal(got.past_key_values, want.past_key_values, REAL, f"{model_type} {plan}")
        assert torch.equal(ee.adept.last_depth, DEPTH)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_the_decoder_alone_has_no_head(model_type: str) -> None:
    """Who calls it wants every hidden state, and the cache."""
    model, ee, given = ready(model_type)
    with Oracle(model, EXITS).exits_for(WANTS, REAL):
        want = model.get_decoder()(**given)
    ee(**given)
    got = ee.adept.decoder(**given)
    assert_close(got.last_hidden_state[REAL], want.last_hidden_state[REAL], model_type)
    assert_cache_equal(got.past_key_values, want.past_key_values, REAL, model_type)
    assert torch.equal(ee.adept.last_depth, DEPTH)


@torch.no_grad()
def test_masks_are_those_of_a_call_with_a_cache() -> None:
    """Without a mask and without a cache, transformers takes restarting positions for packing."""
    model, ee = pair("llama")
    real = torch.ones(2, 8, dtype=torch.bool)
    ids = inputs("llama", real)["input_ids"]
    given = {"input_ids": ids, "position_ids": torch.tensor([0, 1, 2, 0, 1, 2, 3, 4]).repeat(2, 1)}
    wants = draw(real, seed=2)
    for more in ({}, {"use_cache": False}):
        want = run_oracle(model, given | more, wants, real)[0]
        for plan in PLANS:
            set_up(ee, [wants.float()], plan)
            assert_close(ee(**given, **more).logits, want.logits, f"{plan} {more}")
    assert not torch.allclose(model(**given).logits, model(**given, use_cache=False).logits)


@torch.no_grad()
def test_forms_of_a_call() -> None:
    """Positional arguments, tuples, labels, inference mode, copies: a row ends in each."""
    model, ee, given = ready("llama")
    want = run_oracle(model, given, WANTS, REAL)[0].logits
    ids, mask = given.pop("input_ids"), given.pop("attention_mask")
    labels = torch.arange(len(REAL)) % LABELS
    calls = [
        lambda each: each(ids, mask, **given).logits,
        lambda each: each(ids, mask, **given, return_dict=False)[0],
        lambda each: each(ids, mask, **given, labels=labels).logits,
        lambda each: each.forward(ids, mask, **given).logits,
        lambda each: torch.inference_mode()(each)(ids, mask, **given).logits,
    ]
    for each in (ee, copy.deepcopy(ee)):
        for index, call in enumerate(calls):
            set_up(each, [WANTS.float()], "auto")
            assert_close(call(each), want, f"call {index}")
            assert torch.equal(each.adept.last_depth, ENDED), index
    set_up(ee, [WANTS.float()], "auto")
    assert len(ee(ids, mask, **given, return_dict=False, labels=labels)) == 2  # and no cache
    restored = adept_fx.restore(ee)
    assert "forward" not in vars(restored)
    assert_same(restored(ids, mask).logits, model(ids, mask).logits, "restored")


def test_training() -> None:
    """Loss and gradients are those of the oracle, through the dense plan."""
    model, ee, given = ready("llama")
    given["labels"] = torch.arange(len(REAL)) % LABELS
    losses, grads = [], []
    try:
        for each in (model.train(), ee.train()):
            model.zero_grad()
            with (
                Oracle(model, EXITS).exits_for(WANTS, REAL)
                if each is model
                else torch.enable_grad()
            ):
                loss = each(**given).loss
            loss.backward()
            losses.append(loss.detach())
            grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    finally:
        model.zero_grad()
        model.eval(), ee.eval()
    assert torch.equal(ee.adept.last_depth, ENDED)
    assert_close(losses[1], losses[0], "loss")
    for name, grad in grads[0].items():
        assert_close(grads[1][name], grad, name)
    assert grads[0]["model.layers.3.mlp.up_proj.weight"].abs().max() > 0
