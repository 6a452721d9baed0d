"""lm-evaluation-harness scores a rewritten model as it scores any model of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from models import VOCAB, tiny
from parity import exiting, prepared, some_left
from wrapped import EXITS, LAYERS, transformed

lm_eval = pytest.importorskip("lm_eval", reason="pip install -e '.[eval]'")

QUESTIONS = ["is one more than two", "what follows from that", "which is it then", "why so"]
CHOICES = ["yes", "no it is not", "maybe"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token per character."""
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocabulary = special | {chr(i): i for i in range(4, VOCAB)}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    model.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **names)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One task of each kind of request, on a file of this machine."""
    folder: Path = tmp_path_factory.mktemp("task")
    documents = [{"question": q, "answer": i % len(CHOICES)} for i, q in enumerate(QUESTIONS)]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, documents)), "utf-8")
    files = {"test": str(folder / "test.jsonl")}
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{question}}?",
    }
    return [
        common
        | {
            "task": "choose",
            "output_type": "multiple_choice",
            "doc_to_choice": CHOICES,
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        common
        | {
            "task": "read",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        common
        | {
            "task": "write",
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ]


def scored(model: Any, tokenizer: Any, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """Every number of every task, and every answer."""
    task_type = pytest.importorskip("lm_eval.api.task").ConfigurableTask
    harness_type = pytest.importorskip("lm_eval.models.huggingface").HFLM
    harness = harness_type(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=3)
    # By hand: `simple_evaluate` first reads the thousands of tasks that come with the harness.
    chosen = {config["task"]: task_type(config=dict(config)) for config in tasks}
    found = lm_eval.evaluate(harness, chosen, bootstrap_iters=0)
    answers = {n: [s["resps"] for s in samples] for n, samples in found["samples"].items()}
    assert answers.keys() == {"choose", "read", "write"}
    return {"results": found["results"], "answers": answers}


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """The original and the rewritten model."""
    model = tiny("llama", layers=LAYERS)
    return model, transformed(model)


@pytest.fixture(scope="module")
def wanted(models: tuple[Any, Any], tokenizer: Any, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """What the original scores."""
    return scored(models[0], tokenizer, tasks)


def test_same_numbers_at_threshold_one(
    models: tuple[Any, Any], tokenizer: Any, tasks: list[dict[str, Any]], wanted: dict[str, Any]
) -> None:
    ee = prepared(models[1], "dense", threshold=1.0)
    assert scored(ee, tokenizer, tasks) == wanted
    assert ee.adept.stats.total_token_layers == ee.adept.stats.needed_token_layers > 0


def test_same_numbers_as_an_original_with_these_exits(
    models: tuple[Any, Any], tokenizer: Any, tasks: list[dict[str, Any]], wanted: dict[str, Any]
) -> None:
    model, ee = models[0], prepared(models[1], "auto")
    found = scored(ee, tokenizer, tasks)
    some_left(ee)
    with exiting(model, EXITS):
        exited = scored(model, tokenizer, tasks)
    assert exited != wanted
    assert found["answers"]["write"] == exited["answers"]["write"]
    for name, values in exited["results"].items():
        numbers = {k: v for k, v in values.items() if isinstance(v, float)}
        assert {k: found["results"][name][k] for k in numbers} == pytest.approx(numbers, rel=1e-5)
