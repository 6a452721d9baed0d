"""`examples/criteria.py`: its table, on a micro model that learned a Markov chain."""

from __future__ import annotations

import io
import math
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import adept_fx
from _criteria import (
    CRITERIA,
    FROM_HERE,
    HERE,
    NOBODY,
    REFERENCES,
    SCHEDULE,
    Budget,
    Comparison,
    Row,
    exits_taken,
    promising_schedules,
    schedules,
)
from adept_fx import ExitConfig
from criteria import show, verdict
from models import tiny

pytestmark = pytest.mark.slow  # the table takes a minute, and all need it

LENGTH, TEXTS, EXITS, LAYERS = 24, 48, (1, 2), 3
BUDGET = Budget(target=0.8, adapter_steps=8, gate_steps=8, batch=16, fit_batch=4, rounds=1)


def chain(count: int, seed: int) -> Tensor:
    """Texts in which a token mostly says what comes next, `[count, LENGTH]`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(count, LENGTH, dtype=torch.long)
    ids[:, 0] = torch.randint(3, 32, (count,), generator=generator)
    noise = torch.randint(3, 32, (count, LENGTH), generator=generator)
    known = torch.rand(count, LENGTH, generator=generator) < 0.8
    for at in range(1, LENGTH):
        ids[:, at] = torch.where(known[:, at], 3 + ids[:, at - 1] * 7 % 29, noise[:, at])
    return ids


def trained() -> Any:
    model = tiny("llama", layers=LAYERS).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(80):
        ids = chain(16, step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@cache
def table() -> tuple[Any, Comparison, list[Row], dict[str, Tensor], dict[str, Tensor]]:
    """The rewritten model, the rows, and its weights before and after the criteria's turn."""
    ee = adept_fx.transform(trained(), ExitConfig(exits=EXITS, gate="max_prob", adapter_rank=4))
    train, calibration, test = chain(3 * TEXTS, 1000).split(TEXTS)
    comparison = Comparison(ee, train, calibration, test, BUDGET)
    before = weights(ee)
    rows = comparison.run()
    return ee, comparison, rows, before, weights(ee)


def weights(ee: Any) -> dict[str, Tensor]:
    """All but the gates'."""
    state = ee.state_dict().items()
    return {name: value.clone() for name, value in state if not name.startswith("adept.gates")}


def row(name: str) -> Row:
    return next(row for row in table()[2] if row.name == name)


def test_all_criteria_and_references_are_there() -> None:
    _, comparison, rows, *_ = table()
    assert not comparison.skipped
    assert tuple(row.name for row in rows[-len(REFERENCES) :]) == REFERENCES
    names = [row.name for row in rows[: -len(REFERENCES)]]
    assert sorted(names) == sorted([*(item.name for item in CRITERIA), SCHEDULE])
    assert all(item.paper for item in rows if item.name in names)


def test_the_figures_are_possible() -> None:
    _, comparison, rows, *_ = table()
    trained_ones = {item.name for item in CRITERIA if item.objective}
    most = 1 - EXITS[0] / LAYERS
    assert 0 < comparison.nll < math.log(128)
    for item in rows:
        assert 0 <= item.saved <= most + 1e-9
        assert 0 <= item.agreement <= 1
        assert 0 < item.nll_ratio < 10
        assert len(item.thresholds) == len(EXITS)
        assert math.isclose(item.saved, sum(item.saved_by_text) / TEXTS, abs_tol=1e-9)
        assert (item.parameters > 0) == (item.name in trained_ones)
        assert (item.fit_seconds > 0) == (item.name in trained_ones)
        assert (item.cost is None) == (item.name in REFERENCES) == (item.promised is None)
        assert item.cost is None or item.cost > 0
        if item.promised is False and item.name != SCHEDULE:
            assert item.saved == 0
            assert item.agreement == 1
    ranked = [(not item.promised, -item.saved) for item in rows[: -len(REFERENCES)]]
    assert all(left <= right for left, right in pairwise(ranked))
    assert any(item.promised and item.saved > 0 for item in rows)


def test_references_bound_what_is_possible() -> None:
    assert row(NOBODY).saved == 0
    assert row(NOBODY).agreement == 1
    assert math.isclose(row(NOBODY).nll_ratio, 1, abs_tol=1e-6)
    assert row(HERE).saved >= row(FROM_HERE).saved > 0


def test_criteria_share_the_model_and_its_exit_adapters() -> None:
    *_, before, after = table()
    assert any(name.startswith("adept.adapters") for name in before)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_table_is_printed_and_names_the_best() -> None:
    rows = table()[2]
    output = io.StringIO()
    show(Console(width=140, file=output), rows, BUDGET.target)
    text = output.getvalue()
    assert all(item.name in text for item in rows)
    assert verdict(rows) in text
    assert verdict(rows).startswith(f"Best: {rows[0].name} ({rows[0].paper})")
    assert verdict([item for item in rows if not item.promised]).startswith("No criterion")


def test_schedules_that_are_tried_save_more_and_more_and_none_is_beaten() -> None:
    agrees = torch.rand(3, 10, 16, generator=torch.Generator().manual_seed(0)) < 0.7
    agrees[1] |= agrees[0]
    agrees[2] = True
    shares = (0.75, 0.5, 0.25)
    gains, wrong = torch.tensor([*shares, 0.0]), torch.cat(((~agrees), torch.zeros(1, 10, 16)))

    def outcome(options: dict[str, Any]) -> tuple[float, float]:
        taken = exits_taken(options, 3, 16)
        return float(gains[taken].mean()), float(wrong.mean(1).gather(0, taken[None]).mean())

    tried = [outcome(options) for options in promising_schedules(agrees, shares, risk=0.2)]
    assert len(tried) > 3
    assert all(left[0] < right[0] and left[1] < right[1] for left, right in pairwise(tried))
    assert tried[-1][1] <= 0.2 + 1e-6
    every = [outcome(options) for options in schedules(3, 16)]
    for saved, risk in tried:
        assert not any(more > saved + 1e-6 and less < risk - 1e-6 for more, less in every)
    # Nothing is good enough: the one that loses least.
    assert len(promising_schedules(torch.zeros_like(agrees), shares, risk=0.01)) == 1
