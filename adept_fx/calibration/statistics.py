"""P-values for the mean of bounded losses, and tests in a fixed order. No model is needed here.

The null hypothesis is always "the risk, the expected loss of a text, is above ``alpha``". Losses
lie in [0, 1] and are independent, as texts drawn one by one are.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from adept_fx.errors import ConfigError

BOUNDS = ("hoeffding-bentkus", "betting")

_ROUNDING = 1e-9  # of a sum of losses: a whole number must not become the next one
_MOST_TEXTS = 2**20
_STEPS = 50  # of bisection: as exact as a float


def p_value_hb(mean: float, n: int, alpha: float) -> float:
    """The Hoeffding-Bentkus p-value, valid for any losses in [0, 1].

    The smaller of Hoeffding's and Bentkus' tail bounds (Bates et al. 2021, arXiv:2101.02703,
    proposition 1 of Angelopoulos et al. 2021, arXiv:2110.01052).

    Args:
        mean: Mean loss of the texts.
        n: Number of texts.
        alpha: The risk that must not be exceeded.

    Returns:
        At most 1. It grows with the mean and falls with alpha.
    """
    if n < 1 or not 0.0 < alpha < 1.0 or not mean < alpha:
        return 0.0 if n >= 1 and alpha >= 1.0 and mean < 1.0 else 1.0
    hoeffding = math.exp(-n * _relative_entropy(max(mean, 0.0), alpha))
    bentkus = math.e * binomial_cdf(math.ceil(n * max(mean, 0.0) - _ROUNDING), n, alpha)
    return min(hoeffding, bentkus, 1.0)


def _relative_entropy(a: float, b: float) -> float:
    """Of two coins, in nats."""
    heads = a * math.log(a / b) if a > 0.0 else 0.0
    tails = (1.0 - a) * math.log((1.0 - a) / (1.0 - b)) if a < 1.0 else 0.0
    return heads + tails


def binomial_cdf(k: int, n: int, p: float) -> float:
    """``P(Binomial(n, p) <= k)`` for ``0 < p < 1``, by a sum of logarithms."""
    if k < 0 or k >= n:
        return 0.0 if k < 0 else 1.0
    heads = torch.arange(k + 1, dtype=torch.float64)
    ways = math.lgamma(n + 1) - torch.lgamma(heads + 1) - torch.lgamma(n - heads + 1)
    logs = ways + heads * math.log(p) + (n - heads) * math.log1p(-p)
    return min(1.0, math.exp(float(torch.logsumexp(logs, 0))))


def p_value_betting(losses: Tensor, alpha: float, delta: float) -> float:
    """A p-value by betting against the null hypothesis, text after text.

    A gambler who stakes a share of the capital on every text's loss being below alpha cannot expect
    to win while the risk is above alpha, so that reaching ``1 / p`` times the first capital has a
    probability of at most ``p`` (Ville's inequality). The stakes are the predictable plug-in of
    Waudby-Smith & Ramdas, arXiv:2010.09686, section 4.2: large where losses vary little. They are
    cut at 1 and not at ``1 / (1 - alpha)``: the p-value then falls with alpha for sure.

    Args:
        losses: In an order that was fixed before they were seen, ``[n]``.
        alpha: The risk that must not be exceeded.
        delta: The level that the test is to reach; it chooses stakes, not validity.
    """
    n = len(losses)
    if not n:
        return 1.0
    found = losses.double()
    count = torch.arange(1, n + 1, dtype=torch.float64)
    means = (0.5 + found.cumsum(0)) / (count + 1)
    spread = (0.25 + (found - means).square().cumsum(0)) / (count + 1)
    before = torch.cat((spread.new_tensor([0.25]), spread[:-1]))  # what is known when staking
    stakes = (2.0 * math.log(1.0 / delta) / (n * before)).sqrt().clamp(max=1.0)
    capital = torch.log1p(stakes * (alpha - found)).cumsum(0)
    return min(1.0, math.exp(-float(capital.max())))


def p_value(losses: Tensor, alpha: float, delta: float, bound: str) -> float:
    """The p-value by the bound of that name, of losses ``[n]``.

    Raises:
        ConfigError: No bound has that name.
    """
    if bound == "betting":
        return p_value_betting(losses, alpha, delta)
    if bound != "hoeffding-bentkus":
        raise ConfigError(f"unknown bound {bound!r}", hint=f"known: {', '.join(BOUNDS)}")
    n = len(losses)
    return p_value_hb(float(losses.double().mean()) if n else 1.0, n, alpha)


def risk_bound(losses: Tensor, delta: float, bound: str) -> float:
    """The smallest alpha whose test passes: the risk is below it with probability ``1 - delta``."""
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if p_value(losses, middle, delta, bound) <= delta:
            high = middle
        else:
            low = middle
    return high


def fixed_sequence(
    losses: Iterable[Tensor], alpha: float, delta: float, bound: str = BOUNDS[0]
) -> list[float]:
    """Tests candidates in an order fixed beforehand, and stops at the first that fails.

    No correction for their number is needed: the first true null hypothesis in the order is
    rejected with a probability of at most delta, and nothing behind it is tested unless it is
    (Angelopoulos et al. 2021, arXiv:2110.01052, section 3.2).

    Args:
        losses: Per candidate, those of the same texts, ``[n]`` each. They are taken one by one:
            those behind the first failure are never asked for.
        alpha: The risk that must not be exceeded.
        delta: Probability of any false promise.
        bound: How p-values are computed.

    Returns:
        The p-values of those that were tested. All have passed, but perhaps the last.
    """
    found: list[float] = []
    for item in losses:
        found.append(p_value(item, alpha, delta, bound))
        if found[-1] > delta:
            break
    return found


def passed(p_values: Sequence[float], delta: float) -> int:
    """How many candidates of a :func:`fixed_sequence` passed."""
    return sum(item <= delta for item in p_values)


def texts_needed(losses: Tensor, alpha: float, delta: float, bound: str) -> int | None:
    """How many texts like these would pass; None if no number would, or millions.

    Args:
        losses: Of the texts that there are, ``[n]``; none are taken for texts without any loss.
        alpha: The risk that must not be exceeded.
        delta: The level of the test.
        bound: How p-values are computed.
    """
    seen = losses if len(losses) else torch.zeros(1)

    def passes(n: int) -> bool:
        repeated = seen.repeat(-(-n // len(seen)))[:n]
        return p_value(repeated, alpha, delta, bound) <= delta

    high = 1
    while not passes(high):
        high *= 2
        if high > _MOST_TEXTS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high
