"""`generate` and what stands on it are unchanged; threads may share a transformed model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    TextGenerationPipeline,
    TextIteratorStreamer,
    pipeline,
)

from adept_fx.gates import FixedDepth, Gate, GateInputs
from models import VOCAB
from product import EXITS, raw, rewritten, set_up, short

IDS = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5], [0, 11, 12, 13, 14]])
PROMPT = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 7}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampling": {"do_sample": True, "max_new_tokens": 7, "top_k": 20, "temperature": 1.5},
    "beams": {**GREEDY, "num_beams": 3},
    "beam_samples": {"do_sample": True, "max_new_tokens": 5, "num_beams": 2},
    "returned": {"do_sample": True, "max_new_tokens": 5, "num_return_sequences": 2},
    "static": {**GREEDY, "cache_implementation": "static"},
    "static_beams": {**GREEDY, "num_beams": 2, "cache_implementation": "static"},
    "no_cache": {**GREEDY, "use_cache": False},
    "lookup": {**GREEDY, "prompt_lookup_num_tokens": 2},
}


@contextmanager
def gated(gate: Gate, threshold: float = 0.5, plan: str = "auto") -> Iterator[Any]:
    """The shared llama with another gate, its settings put back afterwards."""
    ee = rewritten("llama")
    set_up(ee, [torch.zeros(2, 1, 1)], plan)
    ee.adept.set_gates(gate)
    ee.adept.thresholds = threshold
    ee.adept.stats.reset()
    try:
        yield ee
    finally:
        set_up(ee, [torch.zeros(2, 1, 1)], "auto")


def says(model: Any, options: dict[str, Any], prompt: dict[str, Any] = PROMPT) -> Any:
    torch.manual_seed(3)
    with torch.random.fork_rng(devices=[]):
        return model.generate(**prompt, **options)


def prompt_of(way: str) -> dict[str, Any]:
    return {k: v[1:2] for k, v in PROMPT.items()} if way == "lookup" else PROMPT


@pytest.mark.parametrize("way", WAYS)
def test_never_exits_says_what_the_original_says(way: str) -> None:
    with gated(FixedDepth(0), threshold=1.0, plan="dense") as ee:
        got = says(ee, WAYS[way], prompt_of(way))
        assert ee.adept.stats.exited == {"prefill": [0, 0], "decode": [0, 0]}
    assert torch.equal(got, says(raw("llama"), WAYS[way], prompt_of(way)))


@pytest.mark.parametrize("way", WAYS)
def test_all_out_says_what_the_cut_model_says(way: str) -> None:
    with gated(FixedDepth(1)) as ee:
        got = says(ee, WAYS[way], prompt_of(way))
        stats = ee.adept.stats
        assert stats.exited == {phase: [0, n[1]] for phase, n in stats.seen.items()}
        assert stats.needed_token_layers * 4 == stats.total_token_layers * EXITS[1]
    assert torch.equal(got, says(short("llama", EXITS[1]), WAYS[way], prompt_of(way)))


def test_going_on_with_a_returned_cache() -> None:
    options = {**GREEDY, "return_dict_in_generate": True}
    texts = []
    with gated(FixedDepth(0)) as ee:
        for model in (ee, short("llama", EXITS[0])):
            first = says(model, options)
            longer = torch.cat([first.sequences, IDS[:, 2:4]], dim=1)
            mask = torch.cat([PROMPT["attention_mask"], torch.ones(3, 9, dtype=torch.long)], dim=1)
            prompt = {"input_ids": longer, "attention_mask": mask}
            second = says(model, {**options, "past_key_values": first.past_key_values}, prompt)
            fresh = says(model, GREEDY, prompt)
            assert torch.equal(second.sequences, fresh), type(model)
            texts.append(fresh)
    assert torch.equal(*texts)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCAB)}
    inner = Tokenizer(WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="w0", unk_token="w3", padding_side="left"
    )


def test_streaming_from_a_thread() -> None:
    with gated(FixedDepth(0)) as ee:
        streamer = TextIteratorStreamer(tokenizer(), timeout=60)
        prompt = {"input_ids": IDS[1:2], "attention_mask": torch.ones(1, 5, dtype=torch.long)}
        keywords = {**prompt, **GREEDY, "streamer": streamer}
        thread = Thread(target=ee.generate, kwargs=keywords)
        thread.start()
        text = "".join(streamer)
        thread.join()
    want = says(short("llama", EXITS[0]), GREEDY, prompt)
    assert text.split() == str(tokenizer().decode(want[0])).split()


@pytest.mark.parametrize("batch", [1, 3])
def test_the_text_generation_pipeline(batch: int) -> None:
    prompts = ["w5 w6 w7", "w9 w8 w7 w6 w5", "w11 w12"]
    texts = []
    with gated(FixedDepth(0)) as ee:
        for model in (ee, short("llama", EXITS[0])):
            pipe = pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
            assert isinstance(pipe, TextGenerationPipeline)
            texts.append(pipe(prompts, batch_size=batch, **GREEDY))
        assert ee.adept.stats.exited["decode"][0] > 0
    assert texts[0] == texts[1]


class Parity(Gate):
    """Lets about every other token leave, by its own state alone."""

    def forward(self, tokens: GateInputs) -> Tensor:
        return (tokens.hidden[:, tokens.exit_index] > 0).float()


def together(tasks: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    barrier = Barrier(len(tasks))

    def run(task: Callable[[], Tensor]) -> Tensor:
        barrier.wait(30)
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return list(pool.map(run, tasks))


def test_two_threads_may_generate_with_one_model() -> None:
    other = {"input_ids": IDS[1:2, 1:] + 40, "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    prompts, options = [PROMPT, other], {**GREEDY, "max_new_tokens": 20}
    with gated(Parity()) as ee:
        tasks = [partial(ee.generate, **prompt, **options) for prompt in prompts]
        alone = [task() for task in tasks]
        counts = ee.adept.stats.as_dict()
        assert 0 < counts["decode"]["exited"][0] < counts["decode"]["seen"][0]
        for _ in range(2):
            ee.adept.stats.reset()
            for got, want in zip(together(tasks), alone, strict=True):
                assert torch.equal(got, want)
            assert ee.adept.stats.as_dict() == counts


def test_two_threads_may_make_the_first_call() -> None:
    """Both find that the graph must be captured again."""
    with gated(Parity()) as ee:
        task = lambda: ee.generate(**PROMPT, **GREEDY)  # noqa: E731
        want = task()
        ee.adept._forward.forget()
        for got in together([task, task]):
            assert torch.equal(got, want)
