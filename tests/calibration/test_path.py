"""What to try, by what exits were seen to say."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adept_fx.calibration.path import Path, Recorded, levels
from strategies import examples


def _seen(scores: list[list[float]], wrong: list[list[int]]) -> Recorded:
    count = len(scores[0])
    even = torch.full((count,), 1 / count, dtype=torch.float64)
    exits = tuple(range(1, len(scores) + 1))
    return Recorded(
        torch.tensor(scores), torch.tensor(wrong).bool(), even, even, exits, len(exits) + 1
    )


def _random(seed: int, exits: int = 3, tokens: int = 40, use: float = 0.5) -> Recorded:
    """Gates whose scores say something about mistakes, but not all."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(exits, tokens, generator=generator)
    noise = torch.rand(exits, tokens, generator=generator)
    wrong = (1 - use) * noise + use * (1 - scores) > 0.6
    return _seen(scores.tolist(), wrong.int().tolist())


def test_an_outcome_by_hand() -> None:
    seen = _seen([[0.9, 0.2, 0.5, 0.9], [0.1, 0.8, 0.3, 0.9]], [[0, 0, 0, 1], [1, 1, 0, 0]])
    assert seen.outcome((1.0, 1.0)) == (0.0, 0.0)
    # The first and the last leave at 1, of which one is wrong; the second leaves at 2, wrong.
    risk, saved = seen.outcome((0.5, 0.3))
    assert risk == pytest.approx(2 / 4)
    assert saved == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 4)


@examples(40)
@given(seed=st.integers(0, 10**6), exits=st.integers(1, 4), use=st.floats(0, 1))
def test_a_path_leads_from_nobody_to_everybody(seed: int, exits: int, use: float) -> None:
    seen = _random(seed, exits, use=use)
    path = Path(seen)
    assert path.thresholds(0.0) == (1.0,) * exits
    assert seen.outcome(path.thresholds(path.end))[1] == pytest.approx(exits / (exits + 1))
    for share in torch.linspace(0, 1, 9).tolist():
        found = path.thresholds(share * path.end)
        assert all(0.0 <= value <= 1.0 for value in found)
        assert seen.outcome(found)[1] <= share * path.end


def test_as_good_as_all_thresholds_tried() -> None:
    """At levels of the path, no other thresholds save much more at no more risk."""
    for seed in range(3):
        seen = _random(seed, exits=2, tokens=24)
        path = Path(seen)
        values = [[1.0, 0.0, *row.tolist()] for row in seen.scores]
        everything = [seen.outcome(bars) for bars in itertools.product(*values)]
        for risk in (0.0, 0.1, 0.2, 0.3):
            best = max(saved for other, saved in everything if other <= risk + 1e-9)
            found = [seen.outcome(path.thresholds(at / 200)) for at in range(134)]
            mine = max(saved for other, saved in found if other <= risk + 1e-9)
            assert mine >= best - 0.06, (seed, risk)


def test_a_gate_that_knows_saves_without_mistakes() -> None:
    seen = _seen([[0.9, 0.8, 0.2, 0.1], [0.5, 0.9, 0.9, 0.1]], [[0, 0, 1, 1], [0, 0, 0, 1]])
    path = Path(seen)
    found = seen.outcome(path.thresholds(path.reached(0.0)))
    assert found == pytest.approx((0.0, (2 / 3 + 2 / 3 + 1 / 3) / 4))


def test_a_gate_without_use_has_a_path() -> None:
    """Every second token is wrong, whatever its score: the lower hull is a straight line."""
    scores = (torch.arange(1, 41) / 50).tolist()
    seen = _seen([scores], [[at % 2 for at in range(40)]])
    path = Path(seen)
    found = [path.thresholds(path.reached(risk)) for risk in (0.05, 0.1, 0.2)]
    assert [seen.outcome(item)[0] for item in found] == pytest.approx([0.05, 0.1, 0.2], abs=0.03)


@pytest.mark.parametrize(
    "scores", [[0.0, 0.0], [torch.nan, torch.nan], [-1.0, 0.0]], ids=["zero", "nan", "negative"]
)
def test_scores_that_no_threshold_is_below(scores: list[float]) -> None:
    path = Path(_seen([scores], [[0, 0]]))
    assert path.end == 0.0
    assert levels(path, lambda _: 0.0, 0.1) == []


def test_equal_scores_leave_together() -> None:
    seen = _seen([[1.0, 1.0, 1.0, torch.nan]], [[0, 0, 0, 0]])
    path = Path(seen)
    assert path.thresholds(path.end) == (0.0,)
    assert seen.outcome((0.0,)) == (0.0, 0.75 / 2)


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 5.0])
def test_levels_lead_up_to_the_risk(factor: float) -> None:
    """Where real risks are a multiple of the estimate."""
    seen = _random(0, tokens=400)
    path, asked = Path(seen), []

    def measure(thresholds: tuple[float, ...]) -> float:
        asked.append(thresholds)
        return factor * seen.outcome(thresholds)[0]

    found = levels(path, measure, 0.05)
    assert len(asked) <= 9
    assert found == sorted(found)
    risks = [measure(path.thresholds(level)) for level in found]
    assert risks[0] <= 0.02
    assert max(risks) <= 0.055
    last = path.thresholds(found[-1])
    assert risks[-1] >= 0.035 or last == path.thresholds(path.end)
    if factor:
        assert len({path.thresholds(level) for level in found}) >= 4


@pytest.mark.parametrize("power", [0.5, 0.7, 0.9])
def test_a_risk_that_grows_ever_slower_is_kept(power: float) -> None:
    """What a few exits do to other tokens: the first of them cost most."""
    path = Path(_random(4, exits=3, tokens=4000, use=0.8))

    def measure(thresholds: tuple[float, ...]) -> float:
        return float(path.seen.outcome(thresholds)[0] ** power)

    found = levels(path, measure, alpha=0.1)
    assert found
    assert 0.05 < measure(path.thresholds(found[-1])) <= 0.1


def test_tokens_that_cost_without_a_mistake() -> None:
    """Others attend to their keys: the wanted risk is used up before a mistake is made."""
    scores = (torch.arange(4000) / 4000).tolist()
    seen = _seen([scores], [[int(score < 0.2) for score in scores]])
    path = Path(seen)

    def measure(thresholds: tuple[float, ...]) -> float:
        risk, saved = seen.outcome(thresholds)
        return risk + 0.1 * saved

    found = levels(path, measure, alpha=0.02)
    assert 0.015 < measure(path.thresholds(found[-1])) <= 0.02


def test_no_levels_where_the_risk_is_there_before() -> None:
    assert levels(Path(_random(0)), lambda _: 0.2, 0.1) == []
