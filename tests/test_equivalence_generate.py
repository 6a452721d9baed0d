"""Property (a) through `generate`: greedy texts are the original's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dialogue import Case, script
from models import DENSE_TYPES, MODEL_TYPES
from product import EXITS, cache_kinds, raw, rewritten, set_up
from strategies import BF16_TYPES, TYPES, examples

BF16_EPS = 2.0**-7  # from one bfloat16 number to the next


def prompt(case: Case) -> dict[str, Tensor]:
    turn = script(case, len(EXITS)).turns[0]
    return {"input_ids": turn.ids, "attention_mask": turn.real.long()}


def greedy(model: Any, case: Case) -> tuple[Tensor, Tensor]:
    """New tokens [B, steps] and their logits [B, steps, V]."""
    static = {"cache_implementation": "static"} if case.cache == "static" else {}
    out = model.generate(
        **prompt(case),
        **static,
        do_sample=False,
        max_new_tokens=case.steps,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, case.prompt :], torch.stack(out.logits, dim=1)


def rewritten_greedy(model_type: str, dtype: str, plan: str, case: Case) -> Tensor:
    """The rewritten model's tokens, gates asked in every forward and never obeyed."""
    ee, shape = rewritten(model_type, dtype), (len(EXITS), len(case.lengths))
    widths = [case.prompt] + [1] * (case.steps - 1)
    gate = set_up(ee, [torch.ones(*shape, width) for width in widths], plan, threshold=1.0)
    tokens = greedy(ee, case)[0]
    assert gate.forwards == len(widths), f"{model_type} plan={plan}: {gate.forwards} forwards"
    return tokens


def check(model_type: str, dtype: str, plan: str, case: Case) -> None:
    got = rewritten_greedy(model_type, dtype, plan, case)
    want, logits = greedy(raw(model_type, dtype), case)
    assert got.shape == want.shape
    for row in range(len(case.lengths)):
        count = case.steps
        if dtype == "bf16" and plan != "dense":
            count = first_tie(logits[row])
        what = f"{model_type} {dtype} plan={plan} row={row} of {case}: {got[row]}, not {want[row]}"
        assert torch.equal(got[row][:count], want[row][:count]), what


def first_tie(logits: Tensor) -> int:
    """The first step whose top two lie within one rounding; from there texts may differ."""
    top = logits.float().topk(2, dim=-1).values
    close = (top[:, 0] - top[:, 1]) <= BF16_EPS * top.abs().amax(-1)
    return int(close.int().argmax()) if bool(close.any()) else len(logits)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_greedy_texts_are_the_originals(model_type: str) -> None:
    for cache in cache_kinds(model_type):
        case = Case(lengths=(7, 3, 5), cache=cache, steps=8, seed=1)
        for plan in ("auto", "dense", "compact"):
            check(model_type, "fp32", plan, case)


@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_greedy_texts_are_the_originals_in_bf16(model_type: str) -> None:
    for cache in cache_kinds(model_type):
        case = Case(lengths=(7, 3, 5), cache=cache, steps=8, seed=1)
        for plan in ("auto", "dense"):
            check(model_type, "bf16", plan, case)


@pytest.mark.parametrize(
    ("model_type", "dtype"), [(t, "fp32") for t in TYPES] + [(t, "bf16") for t in BF16_TYPES]
)
@examples(3)
@given(data=st.data())
def test_greedy_texts_of_any_batch(model_type: str, dtype: str, data: st.DataObject) -> None:
    case = Case(
        lengths=tuple(data.draw(st.lists(st.integers(1, 24), min_size=1, max_size=4))),
        extra=data.draw(st.sampled_from((0, 1))),
        cache=data.draw(st.sampled_from(cache_kinds(model_type))),
        steps=data.draw(st.integers(2, 8)),
        seed=data.draw(st.integers(0, 1_000_000)),
    )
    check(model_type, dtype, data.draw(st.sampled_from(("auto", "dense"))), case)
