"""Design section 2 as properties: any batch, padding, exits, chunks, cache and dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dialogue import Case, Script, assert_trace_equal, joined, joined_script, script
from models import SLIDING_TYPES
from oracle import assert_close, assert_row_equal
from product import (
    EXITS,
    PLANS,
    check_all_out,
    check_exits,
    check_never,
    check_plans,
    label,
    play_product,
    rewritten,
)
from strategies import BF16_TYPES, EXIT_SETS, TYPES, drawn_case, examples

every_type = pytest.mark.parametrize("model_type", TYPES)


@every_type
@examples(8)
@given(data=st.data())
def test_never_exits_is_the_original(model_type: str, data: st.DataObject) -> None:
    check_never(model_type, script(data.draw(drawn_case(model_type)), len(EXITS)))


@pytest.mark.parametrize("model_type", BF16_TYPES)
@examples(6)
@given(data=st.data())
def test_never_exits_is_the_original_in_bf16(model_type: str, data: st.DataObject) -> None:
    check_never(model_type, script(data.draw(drawn_case(model_type)), len(EXITS)), "bf16")


@every_type
@examples(14)
@given(data=st.data())
def test_any_exits_are_the_oracles(model_type: str, data: st.DataObject) -> None:
    exits = data.draw(st.sampled_from(EXIT_SETS.get(model_type, (EXITS,))))
    spoken = script(data.draw(drawn_case(model_type)), len(exits))
    check_exits(model_type, spoken, exits=exits)


@pytest.mark.parametrize("model_type", BF16_TYPES)
@examples(8)
@given(data=st.data())
def test_any_exits_are_the_oracles_in_bf16(model_type: str, data: st.DataObject) -> None:
    check_exits(model_type, script(data.draw(drawn_case(model_type)), len(EXITS)), "bf16")


@every_type
@examples(6)
@given(data=st.data())
def test_a_row_of_a_batch_is_the_row_alone(model_type: str, data: st.DataObject) -> None:
    case = data.draw(drawn_case(model_type))
    plan = data.draw(st.sampled_from(PLANS))
    spoken, row = script(case, len(EXITS)), data.draw(st.integers(0, len(case.lengths) - 1))
    batch = play_product(rewritten(model_type), spoken, plan)
    alone = spoken.row(row, strip=_strippable(model_type, case))
    single = play_product(rewritten(model_type), alone, data.draw(st.sampled_from(PLANS)))
    where = f"{label(model_type, 'fp32', plan, spoken)} row={row}"
    here, there = joined_script(spoken).turns[0], joined_script(alone).turns[0]
    mine, own = joined(batch), joined(single)
    real = here.real[row]
    assert_close(mine.outputs[0][row][real], own.outputs[0][0][there.real[0]], where)
    assert torch.equal(mine.depths[0][row][real], own.depths[0][0][there.real[0]]), where
    if case.cache != "none":
        assert_row_equal(batch.cache, here.seen, row, single.cache, there.seen, where)


def _strippable(model_type: str, case: Case) -> bool:
    """Whether a row means the same without its padding: no pads inside a sliding window."""
    inside = case.side == "right" and case.columns > case.prompt
    return not (inside and model_type in SLIDING_TYPES)


@every_type
@examples(5)
@given(data=st.data())
def test_all_out_is_the_cut_model(model_type: str, data: st.DataObject) -> None:
    exits = data.draw(st.sampled_from(EXIT_SETS.get(model_type, (EXITS,))))
    index = data.draw(st.integers(0, len(exits) - 1))
    case = data.draw(drawn_case(model_type))
    check_all_out(model_type, script(case, len(exits), out_at=index), index, exits)


@every_type
@examples(5)
@given(data=st.data())
def test_the_plans_agree(model_type: str, data: st.DataObject) -> None:
    check_plans(model_type, script(data.draw(drawn_case(model_type)), len(EXITS)))


@every_type
@examples(6)
@given(data=st.data())
def test_a_chunked_prefill_is_the_whole_one(model_type: str, data: st.DataObject) -> None:
    case, plan = data.draw(drawn_case(model_type, cached=True)), data.draw(st.sampled_from(PLANS))
    whole, parts = (script(replace(case, chunk=c), len(EXITS)) for c in (0, case.chunk))
    _same_decisions(whole, parts)
    want = joined(play_product(rewritten(model_type), whole, plan))
    got = joined(play_product(rewritten(model_type), parts, plan))
    what = f"{label(model_type, 'fp32', plan, parts)} chunked"
    assert_trace_equal(got, want, joined_script(whole), what)


def _same_decisions(one: Script, other: Script) -> None:
    assert torch.equal(torch.cat(one.scores, dim=2), torch.cat(other.scores, dim=2))
