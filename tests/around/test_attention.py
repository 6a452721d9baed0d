"""Attention implementations: of transformers, of a user's own, switched under a running model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from adept_fx.gates import Replay
from oracle import Oracle, assert_cache_equal, assert_close, assert_same
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

REAL = PADDED["attention_mask"].bool()
ALL = torch.ones_like(REAL)
NEXT = torch.tensor([[41], [42], [43]])


@contextmanager
def attending(name: str, *models: Any) -> Iterator[None]:
    """With another implementation, put back afterwards; what would be compiled runs eagerly."""
    before = [model.config._attn_implementation for model in models]
    for model in models:
        model.set_attn_implementation(name)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for model, old in zip(models, before, strict=True):
            model.set_attn_implementation(old)


def two_calls(model: Any, real: Tensor, scores: list[Tensor] | None = None) -> tuple[Any, Any]:
    """A prompt and one more token: the outputs; with `scores`, of the oracle."""
    cache, outputs, seen = DynamicCache(config=model.config), [], real
    oracle = Oracle(model, SMALL_EXITS) if scores else None
    for index, ids in enumerate((PADDED["input_ids"], NEXT)):
        seen = real if index == 0 else torch.cat([real, torch.ones_like(NEXT).bool()], dim=1)
        given = {
            "attention_mask": seen.long(),
            "position_ids": (seen.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :],
            "past_key_values": cache,
        }
        with torch.no_grad():
            if oracle is None or scores is None:
                outputs.append(model(ids, **given))
                continue
            now = seen[:, -ids.shape[1] :]
            with oracle.exits_for((scores[index] > 0.5) & now, now):
                outputs.append(model(ids, **given))
    return outputs[0], outputs[1]


def scores_of(leave: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = [(1, *REAL.shape), (1, *NEXT.shape)]
    return [(torch.rand(shape, generator=generator) < leave).float() for shape in shapes]


@pytest.mark.parametrize("leave", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("real", [REAL, ALL], ids=["padded", "unpadded"])
@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
def test_mixed_exits_equal_the_oracle(name: str, real: Tensor, leave: float) -> None:
    """Of mistral, whose window is shorter than the prompt."""
    model, ee = small("mistral")
    scores, seen = scores_of(leave), torch.cat([real, torch.ones_like(NEXT).bool()], dim=1)
    with attending(name, ee, model):
        wants = two_calls(model, real, scores)
        for plan in PLANS:
            ee.adept.set_gates(Replay(scores))
            ee.adept.plan, ee.adept.thresholds = plan, 0.5
            gots, what = two_calls(ee, real), f"{name} {plan}"
            for got, want, part in zip(gots, wants, (real, torch.ones_like(NEXT) > 0), strict=True):
                assert_close(got.logits[part], want.logits[part], what)
            assert_cache_equal(gots[1].past_key_values, wants[1].past_key_values, seen, what)
            if plan == "dense" and leave == 0.0:
                assert_same(gots[0].logits[real], wants[0].logits[real], what)


# With a static cache `generate` itself cannot pass on flex attention's masks.
@pytest.mark.parametrize(
    ("name", "cache"),
    [("eager", "dynamic"), ("eager", "static"), ("flex_attention", "dynamic")],
)
def test_texts(name: str, cache: str) -> None:
    model, ee = small("mistral")
    options = {**GREEDY, "max_new_tokens": 5, "cache_implementation": cache}
    with attending(name, ee, model):
        never = says(prepared(ee, "dense", threshold=1.0), PADDED, options)
        assert torch.equal(never, says(model, PADDED, options))
        with exiting(model):
            want = says(model, PADDED, options)
        for plan in PLANS:
            assert torch.equal(says(prepared(ee, plan), PADDED, options), want), plan
            some_left(ee)


def test_switching_captures_again() -> None:
    """There and back: the graph follows, and so does the original, whose layers these are."""
    model, ee = small("llama")
    prepared(ee, "compact")
    before = ee.adept.graph
    want = says(ee, PADDED, GREEDY)
    for name in ("eager", "sdpa"):
        ee.set_attn_implementation(name)
        assert torch.equal(says(ee, PADDED, GREEDY), want)
        assert ee.adept.graph is not before
        assert model.config._attn_implementation == ee.config._attn_implementation == name
        before = ee.adept.graph


def per_key(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **keywords: Any
) -> Any:
    """Attention as flash kernels do it: one number per key or no mask, queries at the end."""
    assert mask is None or mask.ndim == 2, f"a mask of {mask.ndim} dimensions"
    queries, keys = query.shape[2], key.shape[2]
    place = torch.arange(keys - queries, keys)[:, None]
    allowed = (torch.arange(keys) <= place)[None, None]
    if mask is not None:
        allowed = allowed & mask[:, None, None, :keys].bool()
    return sdpa_attention_forward(module, query, key, value, allowed, **keywords)


@pytest.mark.parametrize("masks", [True, False], ids=["masks", "no_masks"])
@pytest.mark.parametrize("prompt", [PADDED, FULL], ids=["padded", "unpadded"])
def test_kernels_of_ones_own_get_what_they_take(
    monkeypatch: pytest.MonkeyPatch, prompt: dict[str, Tensor], masks: bool
) -> None:
    """No 4-D mask, even for some tokens of a row; without a mask function never any mask."""
    model, ee = small("llama")
    monkeypatch.setitem(AttentionInterface._global_mapping, "per_key", per_key)
    if masks:
        mapping = AttentionMaskInterface._global_mapping
        monkeypatch.setitem(mapping, "per_key", flash_attention_mask)
    with attending("per_key", ee, model):
        never = says(prepared(ee, "dense", threshold=1.0), prompt, GREEDY)
        assert torch.equal(never, says(model, prompt, GREEDY))
        with exiting(model):
            want = says(model, prompt, GREEDY)
        for plan in PLANS:
            assert torch.equal(says(prepared(ee, plan), prompt, GREEDY), want), plan
            some_left(ee)
