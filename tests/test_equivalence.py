"""Design section 2 on every family, with fixed examples: see test_equivalence_properties.py.

The letters are those of the properties: (a) never exits is the original, (b) any exits are the
oracle's, (d) all out is the cut model, (e) the plans agree, (g) restore gives the original back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import adept_fx
from adept_fx.gates import Replay
from dialogue import Case, assert_trace_equal, play, script
from models import DENSE_TYPES, MODEL_TYPES, MOE_TYPES, tiny
from oracle import assert_same, decoder_layers
from product import (
    EXITS,
    PLANS,
    cache_kinds,
    check_all_out,
    check_exits,
    check_never,
    check_plans,
    label,
    play_product,
    raw,
    rewritten,
    set_up,
)

CASE = Case(lengths=(9, 4, 7), side="left", steps=4)
every_type = pytest.mark.parametrize("model_type", MODEL_TYPES)
every_type_but_experts_slowly = pytest.mark.parametrize(
    "model_type",
    [t if t in DENSE_TYPES else pytest.param(t, marks=pytest.mark.slow) for t in MODEL_TYPES],
)
every_dense_type = pytest.mark.parametrize("model_type", DENSE_TYPES)
some_types = pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "bloom", "mixtral"])


def fixed_cases(model_type: str) -> list[Case]:
    """Prefill and four decode steps on each cache, without a cache, right padding in chunks."""
    kinds = cache_kinds(model_type)
    return [
        *(replace(CASE, cache=kind, seed=seed) for seed, kind in enumerate(kinds)),
        replace(CASE, head=False, side="right", extra=1, chunk=4, seed=2),
        replace(CASE, lengths=(5, 5), head=False, cache="none", explicit=False, seed=3),
        replace(CASE, lengths=(8,), cache=kinds[-1], chunk=5, explicit=False, seed=4),
    ]


@every_type
def test_never_exits_is_the_original(model_type: str) -> None:
    for case in fixed_cases(model_type):
        check_never(model_type, script(case, len(EXITS)))


@every_type_but_experts_slowly
def test_never_exits_is_the_original_in_bf16(model_type: str) -> None:
    for case in fixed_cases(model_type)[:3]:
        check_never(model_type, script(case, len(EXITS)), "bf16")


@every_type
def test_any_exits_are_the_oracles(model_type: str) -> None:
    for case in fixed_cases(model_type):
        check_exits(model_type, script(case, len(EXITS)))


@every_dense_type
def test_any_exits_are_the_oracles_in_bf16(model_type: str) -> None:
    for case in fixed_cases(model_type)[:3]:
        check_exits(model_type, script(case, len(EXITS)), "bf16")


@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_experts_run_in_bf16(model_type: str) -> None:
    spoken = script(CASE, len(EXITS))
    for plan in PLANS:
        trace = play_product(rewritten(model_type, "bf16"), spoken, plan)
        for output, turn in zip(trace.outputs, spoken.turns, strict=True):
            what = label(model_type, "bf16", plan, spoken)
            assert torch.isfinite(output[turn.real]).all(), f"{what} not finite"


@every_type
@pytest.mark.parametrize("index", range(len(EXITS)))
def test_all_out_is_the_cut_model(model_type: str, index: int) -> None:
    for case in fixed_cases(model_type)[:3]:
        check_all_out(model_type, script(case, len(EXITS), out_at=index), index)


@every_type
def test_the_plans_agree(model_type: str) -> None:
    spoken = script(replace(CASE, lengths=(1, 9, 6, 3), seed=5), len(EXITS))
    check_plans(model_type, spoken)
    check_plans(model_type, script(replace(CASE, seed=6), len(EXITS), out_at=0))  # skipped


@some_types
def test_pads_have_finite_values_and_no_depth(model_type: str) -> None:
    spoken = script(replace(CASE, extra=2), len(EXITS))
    for plan in PLANS:
        trace = play_product(rewritten(model_type), spoken, plan)
        what = label(model_type, "fp32", plan, spoken)
        assert all(torch.isfinite(out).all() for out in trace.outputs), what
        for layer, held in enumerate(trace.cache.layers):
            assert torch.isfinite(held.keys).all(), f"{what} layer={layer} keys"
            assert torch.isfinite(held.values).all(), f"{what} layer={layer} values"
        assert not trace.depths[0][~spoken.turns[0].real].any(), what


@some_types
def test_without_gates_it_is_the_original(model_type: str) -> None:
    ee, spoken = rewritten(model_type), script(CASE, len(EXITS))
    gate = set_up(ee, spoken.scores, "dense")
    with ee.adept.disabled():
        got = play(ee, spoken)
    assert gate.forwards == 0
    want = play(raw(model_type), spoken)
    assert_trace_equal(got, want, spoken, f"{model_type} disabled", bitwise=True)
    check_exits(model_type, spoken)  # and the gates are back


@some_types
def test_the_rewritten_graph_runs_not_the_layers(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ee, spoken = rewritten(model_type), script(CASE, len(EXITS))
    wanted = {plan: play_product(ee, spoken, plan) for plan in PLANS}

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("an original layer ran")

    monkeypatch.setattr(type(decoder_layers(raw(model_type))[0]), "forward", refuse)
    with pytest.raises(RuntimeError, match="an original layer ran"):
        play(raw(model_type), spoken)
    for plan, want in wanted.items():
        got = play_product(ee, spoken, plan)
        assert_trace_equal(got, want, spoken, label(model_type, "fp32", plan, spoken))


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "bloom"])
def test_restore_gives_back_the_original(model_type: str) -> None:
    model, spoken = tiny(model_type), script(CASE, len(EXITS))
    before, values = play(model, spoken), {k: v.clone() for k, v in model.state_dict().items()}
    config = adept_fx.ExitConfig(exits=EXITS, gate=Replay(spoken.scores), threshold=0.5)
    ee = adept_fx.transform(model, config)
    assert type(ee) is type(model)
    assert {id(p) for p in model.parameters()} <= {id(p) for p in ee.parameters()}
    play(ee, spoken)
    during = play(model, spoken)
    assert_trace_equal(during, before, spoken, f"{model_type} transformed", bitwise=True)
    back = adept_fx.restore(ee)
    assert type(back) is type(model)
    assert not hasattr(back, "adept")
    assert back.state_dict().keys() == values.keys()
    for name, value in back.state_dict().items():
        assert_same(value, values[name], f"{model_type} {name}")
    for restored in (back, model):
        after = play(restored, spoken)
        assert_trace_equal(after, before, spoken, f"{model_type} restored", bitwise=True)
