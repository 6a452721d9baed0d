"""`leave="rows"`: gates are asked about the tokens that a row's result is made of alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import adept_fx
from adept_fx import ExitConfig
from adept_fx.errors import ConfigError
from adept_fx.gates import GateInputs, Replay
from classify import (
    POOLED,
    REAL,
    WANTS,
    draw,
    inputs,
    last,
    padded,
    pair,
    run,
    run_oracle,
    stopped,
)
from dialogue import THRESHOLD
from models import tiny
from oracle import assert_close
from product import EXITS, LAYERS, PLANS, Counted, set_up


class Watched(Counted):
    """Notes which tokens each exit's gate is shown."""

    shown: dict[int, Tensor]

    def forward(self, tokens: GateInputs) -> Tensor:
        shown = torch.zeros(tokens.batch_shape, dtype=torch.bool)
        shown[tokens.batch_index, tokens.token_index] = True
        self.shown[tokens.exit_index] = shown
        assert len(tokens.hidden) == int(shown.sum())
        return super().forward(tokens)


@cache
def by_row(model_type: str, compiled: bool = False) -> tuple[Any, Any]:
    model, _ = pair(model_type)
    config = ExitConfig(exits=EXITS, gate=Replay([]), threshold=THRESHOLD, leave="rows")
    ee = adept_fx.transform(model, config)
    if compiled:
        ee.adept.compile(backend="eager")
    return model, ee


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text"])
def test_others_stay_until_their_row_is_done(model_type: str, side: str, compiled: bool) -> None:
    real = padded((9, 3, 7, 1, 9, 8), side, columns=11)
    wants, pooled = draw(real, leave=0.5, seed=2), last(real)
    ends = stopped(wants & pooled, real, pooled)
    model, ee = by_row(model_type, compiled)
    given = inputs(model_type, real)
    want, hidden, depth = run_oracle(model, given, ends, real)
    for plan in PLANS:
        set_up(ee, [wants.float()], plan)
        ee.adept.stats.reset()
        got, states = run(ee, ee.adept.decoder, given)
        assert_close(got.logits, want.logits, f"{plan} logits")
        assert_close(states[real], hidden[real], f"{plan} hidden states")
        assert torch.equal(ee.adept.last_depth, depth), plan
        counts = ee.adept.stats.as_dict()["prefill"]
        assert counts["seen"] == [len(real), int((depth[pooled] > EXITS[0]).sum())], plan
        assert counts["exited"] == [int((depth[pooled] == layers).sum()) for layers in EXITS]


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_gates_are_shown_pooled_tokens_alone(plan: str, compiled: bool) -> None:
    _, ee = by_row("llama", compiled)
    gate = Watched([WANTS.float()])
    gate.shown = {}
    set_up(ee, [WANTS.float()], plan)
    ee.adept.set_gates(gate)
    ee(**inputs("llama", REAL))
    assert torch.equal(gate.shown[0], POOLED)
    assert torch.equal(gate.shown[1], POOLED & ~WANTS[0])


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
def test_with_a_whole_cache_nothing_leaves(plan: str) -> None:
    model, ee = by_row("llama")
    set_up(ee, [WANTS.float()], plan)
    given = inputs("llama", REAL) | {"use_cache": True}
    got, want = ee(**given), model(**given)
    assert_close(got.logits, want.logits, "logits")
    assert torch.equal(ee.adept.last_depth, LAYERS * REAL)
    assert got.past_key_values.get_seq_length() == REAL.shape[1]


@torch.no_grad()
def test_trained_gates_leave_the_same_compiled_or_not() -> None:
    """They run outside of the stages then, for few tokens."""
    model, _ = pair("llama")
    config = ExitConfig(exits=EXITS, gate="mlp", threshold=0.5, adapter_rank=2, leave="rows")
    ee = adept_fx.transform(model, config)
    for gate in ee.adept.gate_list():
        torch.nn.init.normal_(gate.weight, std=0.5)
        torch.nn.init.zeros_(gate.bias)
    for adapter in ee.adept.adapters:
        torch.nn.init.normal_(adapter.up, std=0.2)
    real = padded((9, 3, 7, 1, 9, 8), "right", columns=11)
    given = inputs("llama", real)
    want, depth = ee(**given).logits, ee.adept.last_depth
    assert len(set(depth[last(real)].tolist())) > 1
    ee.adept.compile(backend="eager")
    assert_close(ee(**given).logits, want, "logits")
    assert torch.equal(ee.adept.last_depth, depth)


def test_only_where_rows_have_a_result() -> None:
    with pytest.raises(ConfigError, match="no result per row"):
        adept_fx.transform(tiny("llama"), ExitConfig(exits=(1,), leave="rows"))
    with pytest.raises(ConfigError, match="leave='row' is unknown"):
        ExitConfig(leave="row")


def test_it_is_kept_in_json() -> None:
    config = ExitConfig(exits=(1,), leave="rows")
    assert ExitConfig.from_json(config.to_json()) == config
