"""What a check says to a model, and what it notices in the answers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from adept_fx.check.conversation import (
    THRESHOLD,
    Trace,
    Turn,
    conversation,
    difference,
    play,
    scores,
)
from models import VOCAB, tiny

TURNS = conversation(VOCAB)
SEEN = TURNS[-1].seen
ROWS, COLUMNS = SEEN.shape


def test_a_padded_prompt_and_single_tokens() -> None:
    prompt, *steps = TURNS
    assert prompt.ids.shape == prompt.real.shape == prompt.seen.shape
    assert prompt.real[0].all()
    padding = (~prompt.real[1]).sum()
    assert 0 < padding < prompt.ids.shape[1]
    assert not prompt.real[1, :padding].any()
    assert len(steps) >= 3
    for before, turn in zip(TURNS, steps, strict=False):
        assert turn.ids.shape == (ROWS, 1)
        assert turn.real.all()
        assert torch.equal(turn.seen[:, :-1], before.seen)
    again = conversation(VOCAB)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(TURNS, again, strict=True))
    other = conversation(VOCAB, seed=1)
    assert any(not torch.equal(a.ids, b.ids) for a, b in zip(TURNS, other, strict=True))


def test_positions_count_real_tokens_if_the_model_takes_them() -> None:
    given = [turn.inputs(tiny("llama", layers=1)) for turn in TURNS]
    for turn, inputs in zip(TURNS, given, strict=True):
        assert torch.equal(inputs["attention_mask"].bool(), turn.seen)
        assert inputs["position_ids"].shape == turn.ids.shape
    for row in range(ROWS):
        real = [g["position_ids"][row][t.real[row]] for g, t in zip(given, TURNS, strict=True)]
        found = torch.cat(real)
        assert torch.equal(found, torch.arange(len(found)))
    assert "position_ids" not in TURNS[0].inputs(tiny("bloom", layers=1))


@pytest.mark.parametrize("exits", [1, 2, 3])
def test_scores_have_turns_in_which_all_or_none_leave(exits: int) -> None:
    drawn = scores(TURNS, exits)
    wants = [item > THRESHOLD for item in drawn]
    assert [item.shape for item in drawn] == [(exits, *turn.ids.shape) for turn in TURNS]
    assert all(bool(((item >= 0) & (item <= 1)).all()) for item in drawn)
    first = wants[0].any(0)[TURNS[0].real]
    assert first.any()
    assert not first.all()
    assert any(bool(want[0].all()) for want in wants), "a stage is skipped"
    assert not wants[-1].any(), "and tokens go on afterwards"
    again = scores(TURNS, exits)
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))


def test_the_cache_goes_from_turn_to_turn() -> None:
    entered: list[int] = []

    class Around:
        def __init__(self, index: int) -> None:
            entered.append(index)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    model = tiny("llama", layers=2)
    trace = play(model, TURNS, Around)
    assert entered == list(range(len(TURNS)))
    assert trace.cache.layers[0].keys.shape[2] == COLUMNS
    assert not difference(play(model, TURNS), trace, TURNS, 0.0)


def made() -> Trace:
    """Every kind of tensor that caches hold; twelve entries of a state are no columns."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return 1 + torch.rand(shape, generator=generator)

    attention = SimpleNamespace(
        keys=draw(ROWS, 2, COLUMNS, 4),
        values=draw(ROWS, 2, COLUMNS, 4),
        indexer_keys=draw(ROWS, COLUMNS, 4),
        length=COLUMNS,
        window=torch.tensor(3),
    )
    sliding = SimpleNamespace(keys=draw(ROWS, 2, COLUMNS - 1, 4), values=draw(ROWS, 2, 5, 4))
    recurrent = SimpleNamespace(
        conv_states={0: draw(ROWS, 12, 3), 1: None},
        recurrent_states={0: draw(ROWS, 2, 12, 4)},
    )
    logits = [draw(*turn.ids.shape, 8) for turn in TURNS]
    return Trace(logits, SimpleNamespace(layers=[attention, sliding, recurrent]))


PLACES: dict[str, tuple[Callable[[Trace], Tensor], tuple[int, ...], str]] = {
    "logit": (lambda t: t.logits[1], (1, 0, 5), "logits of turn 1"),
    "prompt": (lambda t: t.logits[0], (1, -1, 0), "logits of turn 0"),
    "key": (lambda t: t.cache.layers[0].keys, (1, 1, -1, 2), "keys of cache layer 0"),
    "value": (lambda t: t.cache.layers[0].values, (0, 0, 0, 0), "values of cache layer 0"),
    "index": (lambda t: t.cache.layers[0].indexer_keys, (1, 6, 0), "indexer_keys of cache layer 0"),
    "window": (lambda t: t.cache.layers[1].keys, (1, 0, 3, 0), "keys of cache layer 1"),
    "convolution": (
        lambda t: t.cache.layers[2].conv_states[0],
        (1, 0, 0),
        "conv_states0 of cache layer 2",
    ),
    "state": (
        lambda t: t.cache.layers[2].recurrent_states[0],
        (1, 0, 0, 0),
        "recurrent_states0 of cache layer 2",
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_one_changed_number_is_seen_and_named(name: str) -> None:
    pick, place, where = PLACES[name]
    want, got = made(), made()
    assert difference(got, want, TURNS, 0.0) == ""
    pick(got)[place] += 1e-3
    assert difference(got, want, TURNS, 1e-5).startswith(f"{where}: off by 0.001")
    assert difference(got, want, TURNS, 1e-2) == "", "within the tolerance"
    pick(got)[place] = torch.nan
    assert difference(got, want, TURNS, 1e-2).startswith(where)


PADDED: dict[str, Callable[[Trace], Tensor]] = {
    "logits": lambda t: t.logits[0][1, 0],
    "keys": lambda t: t.cache.layers[0].keys[1, :, 3],
    "index keys": lambda t: t.cache.layers[0].indexer_keys[1, 3],
    "window": lambda t: t.cache.layers[1].keys[1, :, 2],
}


@pytest.mark.parametrize("name", PADDED)
def test_what_stands_at_padding_is_ignored(name: str) -> None:
    want, got = made(), made()
    assert not SEEN[1, 3]
    assert SEEN[1, 4]
    PADDED[name](got).add_(7.0)
    assert difference(got, want, TURNS, 0.0) == ""


def test_what_is_missing_or_of_another_kind_is_seen() -> None:
    want, got = made(), made()
    got.cache.layers[2].recurrent_states[0] = None
    assert difference(got, want, TURNS, 1.0) == "cache layer 2 lacks recurrent_states0"
    got = made()
    got.logits[0] = got.logits[0].double()
    assert "float64" in difference(got, want, TURNS, 1.0)
    got = made()
    got.cache.layers[0].keys = got.cache.layers[0].keys[..., :2]
    assert difference(got, want, TURNS, 1.0).startswith("keys of cache layer 0: ")


def test_an_original_that_is_not_finite_proves_nothing() -> None:
    want = made()
    want.logits[0][0, 0, 0] = torch.inf
    assert difference(want, want, TURNS, 1.0) == "logits of turn 0: the original is not finite"


def test_decoders_with_cross_attention_are_compared_by_their_own_tokens() -> None:
    want, got = made(), made()
    for trace in (want, got):
        trace.cache = SimpleNamespace(self_attention_cache=trace.cache)
    assert difference(got, want, TURNS, 0.0) == ""
    got.cache.self_attention_cache.layers[0].keys[0, 0, 0, 0] += 1
    assert difference(got, want, TURNS, 1e-5).startswith("keys of cache layer 0")


def test_turns_say_nothing_that_a_model_does_not_take() -> None:
    class Model:
        def forward(self, input_ids: Any, attention_mask: Any) -> None: ...

    turn = Turn(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 3))
    assert set(turn.inputs(Model())) == {"input_ids", "attention_mask"}
