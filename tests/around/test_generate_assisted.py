"""Assisted generation: the rewritten model drafts, is drafted for, or both."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from oracle import cut
from parity import GREEDY, ONE, PLANS, SAMPLED, exiting, pair, prepared, says, some_left

TYPES = ("llama", "gemma3_text")


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("model_type", TYPES)
def test_assisting_changes_nothing(model_type: str, options: dict[str, Any]) -> None:
    """Nothing leaves: as target, as draft and as both, the tokens are the original's."""
    model, ee = pair(model_type)
    prepared(ee, "dense", threshold=1.0)
    draft, twin = cut(model, 1), copy.deepcopy(model)
    for target, assistant, originals in (
        (ee, draft, (model, draft)),
        (draft, ee, (draft, model)),
        (ee, ee, (model, twin)),
    ):
        got = says(target, ONE, {**options, "assistant_model": assistant})
        want = says(originals[0], ONE, {**options, "assistant_model": originals[1]})
        assert torch.equal(got, want)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model_type", TYPES)
def test_assisting_a_model_whose_tokens_leave(model_type: str, plan: str) -> None:
    """Whoever drafts, the target says what it says alone; so does that of an exiting draft."""
    model, ee = pair(model_type)
    with exiting(model):
        want = says(model, ONE, GREEDY)
    prepared(ee, plan)
    for assistant in (cut(model, 1), model, ee):
        ee.adept.stats.reset()
        assert torch.equal(says(ee, ONE, {**GREEDY, "assistant_model": assistant}), want)
        some_left(ee)
    ee.adept.stats.reset()
    got = says(model, ONE, {**GREEDY, "assistant_model": ee})
    assert torch.equal(got, says(model, ONE, GREEDY))
    some_left(ee)
