"""A conversation goes on from the cache that the first answer returned."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from parity import GREEDY, IDS, PADDED, PLANS, exiting, pair, prepared, some_left

TYPES = ("llama", "gemma3_text")


def in_turns(model: Any, cache: Any, passed: str) -> Tensor:
    """A conversation of two turns; the second continues from what the first returned."""
    first = model.generate(**PADDED, **GREEDY, past_key_values=cache, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, IDS[:, 3:6]], dim=1)
    mask = torch.cat([PADDED["attention_mask"], torch.ones(3, 11, dtype=torch.long)], dim=1)
    # The last token that was generated is not in the cache yet.
    ids = longer if passed == "whole" else longer[:, -4:]
    second = model.generate(
        ids, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY
    )
    return torch.cat([first.sequences, second[:, -8:]], dim=1)


CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=40),
}


@pytest.mark.parametrize("passed", ["whole", "new"])
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("model_type", TYPES)
def test_going_on_with_a_returned_cache(model_type: str, kind: str, passed: str) -> None:
    model, ee = pair(model_type)
    talk = partial(in_turns, passed=passed)
    prepared(ee, "dense", threshold=1.0)
    assert torch.equal(talk(ee, CACHES[kind](ee)), talk(model, CACHES[kind](model)))
    with exiting(model):
        want = talk(model, CACHES[kind](model))
    for plan in PLANS:
        assert torch.equal(talk(prepared(ee, plan), CACHES[kind](ee)), want), plan
        some_left(ee)
