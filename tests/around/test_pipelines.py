"""`transformers.pipeline` takes a rewritten model as it takes the original."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

import adept_fx
from adept_fx import ExitConfig
from models import VOCAB, tiny_config
from parity import GREEDY, PLANS, SMALL_EXITS, Parity, exiting, prepared, small, some_left

TEXTS = ["w5 w6 w7 w21 w22", "w9 w8 w7 w6 w5 w4 w3 w11", "w11 w12"]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w1"))
    inner.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="w0", unk_token="w1", padding_side="left"
    )


def answers(task: Any, model: Any, batch: int, **options: Any) -> Any:
    pipe: Any = pipeline(task, model=model, tokenizer=tokenizer(), device="cpu")
    return pipe(TEXTS, batch_size=batch, **options)


def assert_alike(got: Any, want: Any) -> None:
    """The same words and labels, and numbers within rounding."""
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for key in want:
            assert_alike(got[key], want[key])
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for mine, its in zip(got, want, strict=True):
            assert_alike(mine, its)
    elif isinstance(want, str):
        assert got == want
    else:
        assert float(got) == pytest.approx(float(want), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_text_generation(batch: int) -> None:
    model, ee = small("llama")
    plain = answers("text-generation", model, batch, **GREEDY)
    assert answers("text-generation", prepared(ee, "dense", 1.0), batch, **GREEDY) == plain
    with exiting(model):
        want = answers("text-generation", model, batch, **GREEDY)
    assert want != plain
    for plan in PLANS:
        assert answers("text-generation", prepared(ee, plan), batch, **GREEDY) == want, plan
        some_left(ee)


@cache
def classifier() -> tuple[Any, Any]:
    config = tiny_config("llama", layers=2, num_labels=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config).eval()
    model.model.load_state_dict(small("llama")[0].model.state_dict())
    gates = ExitConfig(exits=SMALL_EXITS, gate=Parity(), threshold=0.5)
    return model, adept_fx.transform(model, gates)


@pytest.mark.parametrize("batch", [1, 3])
def test_text_classification(batch: int) -> None:
    (model, ee), task = classifier(), "text-classification"
    plain = answers(task, model, batch)
    assert_alike(answers(task, prepared(ee, "dense", threshold=1.0), batch), plain)
    with exiting(model):
        want = answers(task, model, batch)
    assert want != plain
    for plan in PLANS:
        assert_alike(answers(task, prepared(ee, plan), batch), want)
        some_left(ee)
