"""The check's own oracle is the one that the tests of this project believe."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adept_fx.check.conversation import THRESHOLD, conversation, difference, play, scores
from adept_fx.check.oracle import Oracle, _Frozen, decoder_layers
from adept_fx.errors import UnsupportedModelError
from models import VOCAB, tiny
from oracle import Oracle as Believed

EXITS = (1, 3)
TURNS = conversation(VOCAB)


@pytest.mark.parametrize("model_type", ["llama", "bloom"])
def test_it_says_what_the_tests_oracle_says(model_type: str) -> None:
    model = tiny(model_type)
    wants = [score > THRESHOLD for score in scores(TURNS, len(EXITS))]
    ours, believed = Oracle(model, EXITS), Believed(model, EXITS)

    def leaving(index: int) -> AbstractContextManager[Any]:
        return ours.leaving(wants[index], TURNS[index].real)

    def believing(index: int) -> AbstractContextManager[Any]:
        return believed.exits_for(wants[index], TURNS[index].real)

    got, want = play(model, TURNS, leaving), play(model, TURNS, believing)
    assert difference(got, want, TURNS, 0.0) == ""
    plain = play(model, TURNS)
    assert difference(got, plain, TURNS, 1e-3)
    assert difference(play(model, TURNS), plain, TURNS, 0.0) == "", "no hook is left"


def test_no_hook_is_left_after_an_error() -> None:
    model = tiny("llama", layers=2)
    wants, real = torch.ones(1, 1, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="inside"), Oracle(model, (1,)).leaving(wants, real):
        raise RuntimeError("inside")
    assert not any(layer._forward_hooks for layer in decoder_layers(model))


def test_the_layers_are_found() -> None:
    model: Any = tiny("gpt2", layers=3)
    assert decoder_layers(model) == list(model.transformer.h)
    model.transformer.h = nn.ModuleList(model.transformer.h[:2])
    with pytest.raises(UnsupportedModelError, match="GPT2Model has no list of its 3 layers"):
        decoder_layers(model)


STATES: dict[str, tuple[int, ...]] = {
    "plain": (2, 3, 5),
    "streams behind": (2, 3, 4, 5),
    "streams in front": (4, 2, 3, 5),
}


@pytest.mark.parametrize("name", STATES)
def test_states_are_frozen_wherever_their_token_axes_are(name: str) -> None:
    shape = STATES[name]
    at = shape.index(2)
    wants = torch.tensor([[[True, False, False], [False, False, True]]])
    frozen = _Frozen((1,), wants)
    before, after = torch.randn(shape), torch.randn(shape)
    assert torch.equal(frozen.after(1, before), before)
    found = frozen.after(2, after)

    def token(value: Tensor, row: int, column: int) -> Tensor:
        return value.select(at, row).select(at, column)

    for row in range(2):
        for column in range(3):
            source = before if wants[0, row, column] else after
            assert torch.equal(token(found, row, column), token(source, row, column))


def test_a_state_without_token_axes_is_refused() -> None:
    frozen = _Frozen((1,), torch.ones(1, 2, 3, dtype=torch.bool))
    frozen.after(1, torch.zeros(2, 3, 5))
    with pytest.raises(UnsupportedModelError, match=r"\(6, 5\), which has no \[batch, tokens\]"):
        frozen.after(2, torch.zeros(6, 5))


def test_the_first_output_of_a_layer_is_its_state() -> None:
    class Layer(nn.Module):
        def forward(self, hidden: Tensor) -> tuple[Tensor, str]:
            return hidden + 1, "more"

    oracle = object.__new__(Oracle)
    oracle.exits, oracle.layers = (1,), [Layer(), Layer()]
    wants = torch.tensor([[[True, False]]])
    with oracle.leaving(wants, torch.ones(1, 2, dtype=torch.bool)):
        state, more = oracle.layers[0](torch.zeros(1, 2, 4))
        state, more = oracle.layers[1](state)
    assert more == "more"
    assert state[0, :, 0].tolist() == [1.0, 2.0]
