"""Heads that pool otherwise: several tokens, the first one, or one that nobody can foretell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForSequenceClassification
from transformers.cache_utils import Cache
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from classify import (
    LABELS,
    classifier,
    draw,
    inputs,
    last,
    padded,
    rewrite,
    run,
    run_oracle,
    stopped,
)
from models import randomize, tiny_config
from oracle import assert_close, depths
from product import EXITS, LAYERS, PLANS, set_up

REAL = padded((8, 3, 6, 8), "left", columns=9)
WANTS = draw(REAL, 0.6, seed=6)
Pool = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


@dataclass
class WithTokens(SequenceClassifierOutputWithPast):
    """Logits of the row and of each token."""

    each: Tensor | None = None


class Pooled(LlamaForSequenceClassification):
    """A classifier whose pooling is given: `pool(model, hidden, ids, mask)`."""

    pool: Pool
    each = False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        pick: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden = output.last_hidden_state
        if pick is None:
            logits = type(self).pool(self, hidden, input_ids, attention_mask)
        else:
            logits = self.score(hidden[torch.arange(len(pick)), pick])
        each = self.score(hidden) if self.each else None
        return WithTokens(logits=logits, past_key_values=output.past_key_values, each=each)


def masked_mean(model: Any, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    weight = mask[..., None].to(hidden.dtype)
    return (model.score(hidden) * weight).sum(1) / weight.sum(1)


def maximum(model: Any, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    return model.score(hidden).masked_fill(~mask[..., None].bool(), -1e4).amax(1)


def weighted(model: Any, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    score = model.score(hidden)[..., :1].masked_fill(~mask[..., None].bool(), -1e4)
    return model.score((score.softmax(1) * hidden).sum(1))


def marker(model: Any, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The token that holds the largest id, through a layer of its own."""
    at = ids.argmax(-1)[:, None, None].expand(-1, 1, hidden.shape[-1])
    chosen = torch.tanh(hidden.gather(1, at).squeeze(1).float())
    return model.score(torch.nn.functional.dropout(chosen, 0.1, model.training))


def two(model: Any, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    return model.score(hidden[:, -1]) + model.score(hidden[:, -2])


def surest(model: Any, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """A token chosen by the states themselves: nobody can know before they are final."""
    logits = model.score(hidden)
    return logits[torch.arange(len(ids)), logits.amax(-1).argmax(-1)]


def neighbour(model: Any, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of another row."""
    return model.score(hidden)[torch.arange(len(ids)) - 1, -1]


def looking(model: Any, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Decides by a value."""
    logits = model.score(hidden)
    return logits[:, -1] if bool(logits.sum() > 0) else logits[:, -2]


@cache
def pair(pool: Pool, each: bool = False) -> tuple[Any, Any]:
    kind = type("Pooled", (Pooled,), {"pool": staticmethod(pool), "each": each})
    model = kind(tiny_config("llama", LAYERS, num_labels=LABELS)).eval()
    randomize(model, 0)
    return model, rewrite(model)


def check(pair: tuple[Any, Any], pooled: Tensor | None, **more: Any) -> None:
    """A row ends when all of `pooled` have left; never, if it is None."""
    model, ee = pair
    given = inputs("llama", REAL) | more
    want = run_oracle(model, given, WANTS, REAL)[0]
    depth = depths(WANTS if pooled is None else stopped(WANTS, REAL, pooled), EXITS, LAYERS, REAL)
    for plan in PLANS:
        set_up(ee, [WANTS.float()], plan)
        got = run(ee, ee.adept.decoder, given)[0]
        assert_close(got.logits, want.logits, plan)
        assert torch.equal(ee.adept.last_depth, depth), plan
        assert (got.past_key_values is None) == (pooled is not None)


@pytest.mark.parametrize("pool", [masked_mean, maximum, weighted])
def test_all_tokens(pool: Pool) -> None:
    """The row ends when its last token has left: it is that token's exit."""
    check(pair(pool), REAL)


def test_one_token_by_its_id() -> None:
    ids = inputs("llama", REAL)["input_ids"]
    pooled = torch.arange(9) == ids.argmax(-1, keepdim=True)
    check(pair(marker), pooled)
    with torch.inference_mode():
        check(pair(marker), pooled)


def test_several_tokens_count_as_all() -> None:
    """A row never ends while a token that its logits are made of goes on."""
    check(pair(two), REAL)


@pytest.mark.parametrize("pool", [surest, neighbour, looking])
def test_heads_that_cannot_be_followed_end_no_row(pool: Pool) -> None:
    check(pair(pool), None)


def test_further_outputs_count_too() -> None:
    check(pair(marker, each=True), REAL)


def test_arguments_of_the_head_alone() -> None:
    """They reach no decoder, and choose the token here."""
    pick = torch.tensor([2, 7, 4, 6])
    assert REAL[torch.arange(len(pick)), pick].all()
    check(pair(marker), torch.arange(9) == pick[:, None], pick=pick)


def test_hooks_of_the_head_see_no_call_that_nobody_made() -> None:
    model = classifier("llama")
    ee = rewrite(model)
    calls: list[Any] = []
    handle = ee.score.register_forward_hook(lambda *_: calls.append(1))
    set_up(ee, [WANTS.float()] * 2, "auto")
    depth = depths(WANTS, EXITS, LAYERS, REAL)
    run(ee, ee.adept.decoder, inputs("llama", REAL))
    assert len(calls) == 1
    assert torch.equal(ee.adept.last_depth, depth)
    handle.remove()
    run(ee, ee.adept.decoder, inputs("llama", REAL))
    ended = depths(stopped(WANTS, REAL, last(REAL)), EXITS, LAYERS, REAL)
    assert torch.equal(ee.adept.last_depth, ended)


def test_a_new_head_is_followed_at_once() -> None:
    model = classifier("llama")
    ee = rewrite(model)
    ee.score = model.score = torch.nn.Sequential(
        torch.nn.Linear(32, 16), torch.nn.Tanh(), torch.nn.Linear(16, LABELS)
    ).eval()
    check((model, ee), last(REAL))
