"""Half precision, and `torch.autocast` around a model of full precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from oracle import Oracle, assert_same, depths, exact
from parity import (
    FULL,
    GREEDY,
    PADDED,
    PLANS,
    SMALL_EXITS,
    exiting,
    prepared,
    says,
    small,
    some_left,
)
from product import set_up

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}
REAL = PADDED["attention_mask"].bool()
POSITIONS = (REAL.cumsum(-1) - 1).clamp(min=0)
WANTS = torch.rand(1, *REAL.shape, generator=torch.Generator().manual_seed(8)) > 0.6
GIVEN = {**PADDED, "position_ids": POSITIONS}


def oracle(model: Any) -> Tensor:
    with torch.no_grad(), Oracle(model, SMALL_EXITS).exits_for(WANTS & REAL, REAL):
        return model(**GIVEN).logits[REAL]


def error(got: Tensor, truth: Tensor) -> float:
    return (got.double() - truth.double()).abs().max().item()


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_err_no_more_than_the_original(dtype: str) -> None:
    """Against float32: at most twice the error of the reference, of at least one rounding."""
    model, ee = small("llama", HALVES[dtype])
    want, truth = oracle(model), oracle(exact(model))
    allowed = 2 * max(error(want, truth), ROUNDING[dtype] * truth.abs().max().item())
    for plan in PLANS:
        set_up(ee, [WANTS.float()], plan)
        with torch.no_grad():
            got = ee(**GIVEN)
        assert got.logits.dtype == HALVES[dtype]
        assert {layer.keys.dtype for layer in got.past_key_values.layers} == {HALVES[dtype]}
        assert error(got.logits[REAL], truth) <= allowed, plan
        assert torch.equal(ee.adept.last_depth, depths(WANTS, SMALL_EXITS, 2, REAL))
    set_up(ee, [WANTS.float()], "dense")
    with torch.no_grad():
        assert_same(ee(**GIVEN).logits[REAL], want, "the same products in the same order")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("dtype", HALVES)
def test_texts_in_half_precision(dtype: str, cache: str) -> None:
    model, ee = small("llama", HALVES[dtype])
    options = {**GREEDY, "cache_implementation": cache}
    never = says(prepared(ee, "dense", threshold=1.0), PADDED, options)
    assert torch.equal(never, says(model, PADDED, options))
    with exiting(model):
        want = says(model, PADDED, options)
    assert torch.equal(says(prepared(ee, "dense"), PADDED, options), want)
    some_left(ee)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**GIVEN).logits[REAL]


def test_autocast_is_the_originals_bit_for_bit() -> None:
    """Entered, changed and left; the norm of the queries casts what autocast has made half."""
    model, ee = small("qwen3")
    prepared(ee, "dense", threshold=1.0)
    plain = logits(model)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            want = logits(model)
            assert want.dtype == dtype
            assert_same(logits(ee), want, f"autocast to {dtype}")
        assert_same(logits(ee), plain, "without autocast again")
        with torch.autocast("cpu", dtype=dtype):
            assert_same(logits(ee), want, f"autocast to {dtype} again")


def test_texts_under_autocast() -> None:
    model, ee = small("qwen3")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with exiting(model):
            want = says(model, FULL, GREEDY)
        assert torch.equal(says(prepared(ee, "dense"), FULL, GREEDY), want)
        some_left(ee)
        prepared(ee, "compact")
        assert says(ee, FULL, GREEDY).shape == want.shape
        some_left(ee)


def test_gradients_under_autocast() -> None:
    model, ee = small("llama")
    prepared(ee, "dense", threshold=1.0)
    grads = []
    for each in (model, ee):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            each(**GIVEN, labels=PADDED["input_ids"]).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert_same(grads[1][name], grad, f"gradient of {name}")
    model.zero_grad()
