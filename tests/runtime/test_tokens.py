"""Values of tokens that went on and of those that left, put back at their places."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adept_fx.graph.blocks import SynthesizedKV
from adept_fx.ops import tokens as ops
from adept_fx.runtime.run import Run
from adept_fx.runtime.tokens import Tokens

SLOT = "kv_2"


class Cache:
    """Stands for a run: remembers what reached the cache."""

    def __init__(self, batch: int, tokens: int) -> None:
        self.batch, self.tokens = batch, tokens
        self.written: dict[str, tuple[Tensor, ...]] = {}
        self.kept: dict[str, tuple[Tensor, ...]] = {}

    def update(self, slot: str, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.written[slot] = values
        return tuple(value + 100 for value in values)


def layout(run: Any, index: list[int] | None) -> Tokens:
    return Tokens(run, index=None if index is None else torch.tensor(index, dtype=torch.long))


def packed(whole: Tensor, index: list[int]) -> Tensor:
    """Chosen tokens of `[B, ..., S, D]`, as `[1, ..., N, D]`."""
    return whole.movedim(-2, 1).flatten(0, 1)[index].movedim(0, -2).unsqueeze(0)


def left(whole: Tensor, index: list[int], slot: str = SLOT) -> SynthesizedKV:
    return SynthesizedKV(torch.tensor(index), {slot: (packed(whole, index),)})


kinds = st.lists(st.sampled_from(("live", "first", "second", "pad")), min_size=6, max_size=6)


@pytest.mark.parametrize("heads", [(), (3,)], ids=["states", "keys"])
@settings(deadline=None, derandomize=True, max_examples=40)
@given(kinds=kinds)
def test_every_token_comes_to_its_place_and_pads_are_zero(
    heads: tuple[int, ...], kinds: list[str]
) -> None:
    batch, tokens = 2, 3
    whole = torch.randn(batch, *heads, tokens, 4)
    at = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in set(kinds)}
    if set(at) <= {"pad"}:
        return
    here = layout(Cache(batch, tokens), at.get("live", []))
    live = (packed(whole, at["live"]),) if "live" in at else ()
    gone = [left(whole, at[kind]) if kind in at else None for kind in ("first", "second")]
    (found,) = here.assemble(SLOT, live, gone)
    real = torch.tensor([kind != "pad" for kind in kinds]).view(batch, *(1 for _ in heads), tokens)
    assert torch.equal(found, whole * real[..., None])


def test_only_the_values_of_that_slot_are_taken() -> None:
    whole, other = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4)
    run = Cache(2, 3)
    gone = [left(other, [1], "kv_1"), left(whole, [1]), None]
    (found,) = layout(run, [0]).assemble(SLOT, (packed(whole, [0]),), gone)
    assert torch.equal(found[0, :, :2], whole[0, :, :2])
    assert not found[0, :, 2].any()
    assert not found[1].any()


def test_picking_undoes_assembling() -> None:
    states = torch.randn(2, 3, 4)
    here = layout(Cache(2, 3), [1, 3, 5])
    live = packed(states, [1, 3, 5])
    (whole,) = here.assemble(SLOT, (live,), [left(states, [0, 2])])
    assert torch.equal(here.pick(whole), live)
    dense = layout(Cache(2, 3), None)
    assert dense.pick(states) is states


def test_a_stage_without_tokens_writes_what_the_others_left() -> None:
    run, whole = Cache(1, 3), torch.randn(1, 2, 3, 4)
    layout(run, []).write(SLOT, (), [left(whole, [0, 1]), left(whole, [2])])
    assert torch.equal(run.written[SLOT][0], whole)


def test_a_dense_stage_writes_its_values_as_they_are() -> None:
    run, whole = Cache(1, 3), torch.randn(1, 2, 3, 4)
    layout(run, None).write(SLOT, (whole,), [])
    assert run.written[SLOT][0] is whole


def test_what_later_stages_read_is_kept_as_the_cache_returned_it() -> None:
    run, whole = Cache(1, 3), torch.randn(1, 2, 3, 4)
    here = layout(run, [0, 1, 2])
    (plain,) = here.write(SLOT, (packed(whole, [0, 1, 2]),), [])
    assert run.kept == {}
    (shared,) = here.write(SLOT, (packed(whole, [0, 1, 2]),), [], True)
    assert run.kept[SLOT][0] is shared
    assert torch.equal(shared, whole + 100)
    assert torch.equal(shared, plain)


def test_the_lowered_calls_name_slot_and_place() -> None:
    run, whole = Cache(1, 3), torch.randn(1, 2, 3, 4)
    here = layout(run, None)
    keys, values = ops.write_cache(here, whole, -whole, "kv_0", (), True)
    assert ops.read_cache(here, "kv_0", 0) is keys
    assert ops.read_cache(here, "kv_0", 1) is values
    states = torch.randn(1, 3, 4)
    found = ops.write_index(here, states, "indexer_0", ())
    assert torch.equal(found, states + 100)
    assert set(run.kept) == {"kv_0"}


def test_index_keys_reach_their_own_part_of_the_cache() -> None:
    calls: list[tuple[str, int]] = []

    def update(keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        calls.append(("kv", layer))
        return keys, values

    def update_indexer(keys: Tensor, layer: int) -> Tensor:
        calls.append(("indexer", layer))
        return keys + 1

    run: Any = SimpleNamespace(cache=SimpleNamespace(update=update, update_indexer=update_indexer))
    states = torch.randn(1, 3, 4)
    assert torch.equal(Run.update(run, "indexer_12", (states,))[0], states + 1)
    assert Run.update(run, "kv_3", (states, states)) == (states, states)
    assert calls == [("indexer", 12), ("kv", 3)]
    run.cache = None
    assert Run.update(run, "indexer_12", (states,)) == (states,)
