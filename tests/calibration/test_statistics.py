"""P-values: against the definitions, and valid where the null hypothesis is true."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adept_fx.calibration import statistics as stats
from adept_fx.errors import ConfigError
from strategies import examples

ALPHAS = st.floats(0.001, 0.9)
COUNTS = st.integers(1, 400)


def _drawn(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("k", "n", "p"), [(0, 5, 0.3), (2, 7, 0.01), (6, 7, 0.9), (30, 200, 0.2)])
def test_the_binomial_distribution(k: int, n: int, p: float) -> None:
    expected = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))
    assert stats.binomial_cdf(k, n, p) == pytest.approx(expected, rel=1e-9)
    assert stats.binomial_cdf(-1, n, p) == 0.0
    assert stats.binomial_cdf(n, n, p) == 1.0


def test_a_p_value_by_hand() -> None:
    """Three mistakes in a hundred texts, where a tenth is allowed."""
    entropy = 0.03 * math.log(0.3) + 0.97 * math.log(0.97 / 0.9)
    tail = sum(math.comb(100, i) * 0.1**i * 0.9 ** (100 - i) for i in range(4))
    expected = min(math.exp(-100 * entropy), math.e * tail)
    assert stats.p_value_hb(0.03, 100, 0.1) == pytest.approx(expected)


@examples(200)
@given(mean=st.floats(0, 1), more=st.floats(0, 1), n=COUNTS, alpha=ALPHAS, wider=ALPHAS)
def test_hoeffding_bentkus_is_monotone(
    mean: float, more: float, n: int, alpha: float, wider: float
) -> None:
    low, high = sorted((mean, more))
    strict, loose = sorted((alpha, wider))
    value = stats.p_value_hb(low, n, strict)
    assert 0.0 <= value <= 1.0
    assert value <= stats.p_value_hb(high, n, strict) + 1e-12
    assert stats.p_value_hb(low, n, loose) <= value + 1e-12


@examples(100)
@given(mistakes=st.integers(0, 20), n=COUNTS, more=COUNTS, alpha=ALPHAS)
def test_as_many_mistakes_in_more_texts_are_better(
    mistakes: int, n: int, more: int, alpha: float
) -> None:
    n = max(n, mistakes, 1)
    before = stats.p_value_hb(mistakes / n, n, alpha)
    assert stats.p_value_hb(mistakes / (n + more), n + more, alpha) <= before + 1e-9


@examples(100)
@given(seed=st.integers(0, 10**6), n=COUNTS, alpha=ALPHAS, wider=ALPHAS, power=st.floats(0.2, 9))
def test_betting_falls_with_alpha(
    seed: int, n: int, alpha: float, wider: float, power: float
) -> None:
    losses = _drawn(seed, n) ** power
    strict, loose = sorted((alpha, wider))
    value = stats.p_value_betting(losses, strict, 0.05)
    assert 0.0 <= value <= 1.0
    assert stats.p_value_betting(losses, loose, 0.05) <= value + 1e-12


@pytest.mark.parametrize("bound", stats.BOUNDS)
@pytest.mark.parametrize("kind", ["coin", "constant", "spread"])
@pytest.mark.parametrize("alpha", [0.03, 0.2])
def test_a_true_null_hypothesis_is_rarely_rejected(bound: str, kind: str, alpha: float) -> None:
    """In 2000 draws of 150 texts whose risk is just alpha."""
    draws = _drawn(0, 2000, 150)
    losses = {
        "coin": (draws < alpha).double(),
        "constant": torch.full_like(draws, alpha),
        "spread": (2 * alpha * draws),
    }[kind]
    delta = 0.1
    rejected = sum(stats.p_value(row, alpha, delta, bound) <= delta for row in losses)
    assert rejected / 2000 <= delta + 3 * math.sqrt(delta * (1 - delta) / 2000)


def test_betting_promises_more_where_losses_vary_little() -> None:
    losses = 0.02 + 0.002 * _drawn(1, 500)
    plain = stats.risk_bound(losses, 0.05, "hoeffding-bentkus")
    assert stats.risk_bound(losses, 0.05, "betting") < plain - 0.005
    assert stats.p_value_betting(losses, 0.03, 0.05) < 0.05 < stats.p_value_hb(0.021, 500, 0.03)


@pytest.mark.parametrize("bound", stats.BOUNDS)
def test_the_bound_is_where_the_test_passes(bound: str) -> None:
    for seed, n in ((1, 30), (2, 300)):
        losses = _drawn(seed, n) ** 4
        limit = stats.risk_bound(losses, 0.05, bound)
        assert stats.p_value(losses, limit, 0.05, bound) <= 0.05
        assert stats.p_value(losses, limit - 1e-6, 0.05, bound) > 0.05
        assert limit > float(losses.mean())
    assert stats.risk_bound(torch.zeros(1), 0.05, bound) == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize("bound", stats.BOUNDS)
def test_degenerate_texts(bound: str) -> None:
    assert stats.p_value(torch.empty(0), 0.03, 0.05, bound) == 1.0
    assert stats.p_value(torch.zeros(1), 0.03, 0.05, bound) > 0.9
    assert stats.p_value(torch.ones(50), 0.5, 0.05, bound) == 1.0
    assert stats.p_value(torch.zeros(300), 0.03, 0.05, bound) <= 0.05
    assert stats.risk_bound(torch.ones(50), 0.05, bound) == pytest.approx(1.0)
    assert stats.p_value_hb(0.0, 10, 0.0) == 1.0
    assert stats.p_value_hb(0.5, 10, 1.0) == 0.0
    assert stats.p_value_hb(math.nan, 10, 0.5) == 1.0


def test_an_unknown_bound_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown bound 'clt'(.|\n)*betting"):
        stats.p_value(torch.zeros(2), 0.1, 0.05, "clt")


def test_nothing_behind_the_first_failure_is_measured() -> None:
    asked: list[int] = []

    def losses() -> Iterator[Tensor]:
        for at, mean in enumerate((0.0, 0.001, 0.5, 0.0)):
            asked.append(at)
            yield torch.full((300,), mean)

    found = stats.fixed_sequence(losses(), 0.05, 0.05)
    assert asked == [0, 1, 2]
    assert [value <= 0.05 for value in found] == [True, True, False]
    assert stats.passed(found, 0.05) == 2
    assert stats.fixed_sequence((), 0.05, 0.05) == []


@examples(50)
@given(seed=st.integers(0, 10**6), alpha=ALPHAS, wider=ALPHAS, bound=st.sampled_from(stats.BOUNDS))
def test_a_looser_target_never_chooses_less(
    seed: int, alpha: float, wider: float, bound: str
) -> None:
    losses = [_drawn(seed, 80) ** (9 - at) for at in range(8)]
    strict, loose = sorted((alpha, wider))
    counts = [
        stats.passed(stats.fixed_sequence(losses, value, 0.05, bound), 0.05)
        for value in (strict, loose)
    ]
    assert counts[0] <= counts[1]


@pytest.mark.parametrize("bound", stats.BOUNDS)
def test_the_promise_is_broken_in_one_of_twenty_at_most(bound: str) -> None:
    """Candidates whose true risks cross alpha; 200 samples of 120 texts out of 4000."""
    population = _drawn(3, 4000)
    candidates = torch.stack([(population < share).double() for share in torch.linspace(0, 0.2, 9)])
    risks, alpha, broken, chosen = candidates.mean(1), 0.1, 0, 0
    for seed in range(200):
        which = (_drawn(10 + seed, 120) * 4000).long()
        count = stats.passed(stats.fixed_sequence(candidates[:, which], alpha, 0.05, bound), 0.05)
        chosen += count
        broken += bool(count) and bool(risks[count - 1] > alpha)
    assert broken / 200 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)
    assert chosen / 200 > 2  # and something is promised


def test_how_many_texts_a_promise_needs() -> None:
    alpha, delta = 0.03, 0.05
    none = stats.texts_needed(torch.empty(0), alpha, delta, "hoeffding-bentkus")
    assert none == math.ceil(math.log(delta) / math.log(1 - alpha)) == 99
    for bound in stats.BOUNDS:
        losses = torch.tensor([0.0, 0.02, 0.01])
        needed = stats.texts_needed(losses, alpha, delta, bound)
        assert needed is not None
        enough = losses.repeat(needed)[:needed]
        assert stats.p_value(enough, alpha, delta, bound) <= delta
        assert stats.p_value(enough[:-1], alpha, delta, bound) > delta
        assert stats.texts_needed(torch.full((4,), 0.05), alpha, delta, bound) is None
