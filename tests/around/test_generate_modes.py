"""Every way to `generate`: the original's tokens if nothing leaves, the reference's if some do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from models import VOCAB
from parity import (
    FULL,
    GREEDY,
    IDS,
    ONE,
    PADDED,
    PLANS,
    SAMPLED,
    check_generate,
    exiting,
    parity,
    prepared,
    says,
    small,
)
from product import raw

TYPES = ("llama", "gemma3_text")


class FifthWord(StoppingCriteria):
    """Ends a row at a word whose number is a multiple of five."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] % 5 == 0


MODES: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "greedy": (PADDED, GREEDY),
    "sampling": (PADDED, SAMPLED),
    "min_p": (PADDED, {**SAMPLED, "min_p": 0.05, "renormalize_logits": True}),
    "penalties": (PADDED, {**GREEDY, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}),
    "beams": (PADDED, {**GREEDY, "num_beams": 3}),
    "beams_returned": (PADDED, {**GREEDY, "num_beams": 4, "num_return_sequences": 3}),
    "beams_sampled": (PADDED, {**SAMPLED, "num_beams": 3}),
    "returned": (PADDED, {**SAMPLED, "num_return_sequences": 2}),
    "lookup": (ONE, {**GREEDY, "prompt_lookup_num_tokens": 2}),
    "chunks": (PADDED, {**GREEDY, "prefill_chunk_size": 4}),
    "chunks_static": (
        PADDED,
        {**GREEDY, "prefill_chunk_size": 4, "cache_implementation": "static"},
    ),
    "no_cache": (PADDED, {**GREEDY, "use_cache": False}),
    "max_length": (PADDED, {"do_sample": False, "max_length": 14}),
    "end_tokens": (PADDED, {**GREEDY, "eos_token_id": list(range(3, VOCAB, 4))}),
    "stopping": (PADDED, {**GREEDY, "stopping_criteria": StoppingCriteriaList([FifthWord()])}),
    "unpadded": (FULL, GREEDY),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model_type", TYPES)
def test_modes(model_type: str, mode: str) -> None:
    prompt, options = MODES[mode]
    check_generate(model_type, prompt, lambda _: options)


def test_guidance() -> None:
    """Which calls the model without positions: a graph of its own."""
    check_generate("mistral", PADDED, lambda _: {**GREEDY, "guidance_scale": 1.5})


def test_embeddings_as_prompt() -> None:
    embeds = raw("llama").get_input_embeddings()(IDS).detach()
    prompt = {"inputs_embeds": embeds, "attention_mask": PADDED["attention_mask"]}
    check_generate("llama", prompt, lambda _: GREEDY)


def test_scores_are_the_originals_bit_for_bit() -> None:
    options = {**GREEDY, "output_scores": True, "return_dict_in_generate": True}
    ee = parity("llama", "dense", threshold=1.0)
    model: Any = raw("llama")
    got, want = (each.generate(**PADDED, **options) for each in (ee, model))
    assert len(got.scores) == len(want.scores) == 8
    assert all(torch.equal(x, y) for x, y in zip(got.scores, want.scores, strict=True))


def reranked(model: Any, input_ids: Tensor, generation_config: Any, **given: Any) -> Tensor:
    """A loop of a user's own: repeats the cache for candidates, and keeps theirs that win."""
    cache, mask, candidates = given["past_key_values"], given["attention_mask"], 3
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    scores, positions = logits.logits[:, -1], positions[:, -1:]
    while input_ids.shape[1] < generation_config.max_length:
        words = scores.topk(candidates).indices.view(-1, 1)
        cache.batch_repeat_interleave(candidates)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = positions + 1
        tried = model(
            words,
            attention_mask=mask.repeat_interleave(candidates, 0),
            position_ids=positions.repeat_interleave(candidates, 0),
            past_key_values=cache,
        ).logits[:, -1]
        best = tried.amax(-1).view(-1, candidates).argmax(-1)
        best = best + candidates * torch.arange(len(best))
        cache.batch_select_indices(best)
        scores, input_ids = tried[best], torch.cat([input_ids, words[best]], dim=1)
    return input_ids


def test_a_loop_of_ones_own() -> None:
    with torch.no_grad():
        check_generate("llama", PADDED, lambda _: {**GREEDY, "custom_generate": reranked})


class Words(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.words: list[int] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.words += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 2}], ids=["plain", "lookup"])
def test_streamers_get_every_token(options: dict[str, Any]) -> None:
    with exiting(raw("llama")) as model:
        want = says(model, ONE, {**GREEDY, **options})
    for plan in PLANS:
        streamer, ee = Words(), parity("llama", plan)
        says(ee, ONE, {**GREEDY, **options, "streamer": streamer})
        assert streamer.words == want[0].tolist()
        assert streamer.ended == 1


def test_inference_mode() -> None:
    """In it a graph may also be captured that is used outside of it later, for gradients too."""
    model, ee = small("llama")
    prepared(ee, "compact")
    want = says(ee, PADDED, GREEDY)
    ee.adept._forward.forget()
    with torch.inference_mode():
        assert torch.equal(says(ee, PADDED, GREEDY), want)
    assert torch.equal(says(ee, PADDED, GREEDY), want)
    ee.adept.plan = "dense"
    positions = (PADDED["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    ee(**PADDED, position_ids=positions).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    ee.zero_grad()
