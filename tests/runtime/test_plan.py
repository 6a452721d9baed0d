"""The profitability rule and the statistics."""

from __future__ import annotations

import copy

from adept_fx.runtime.plan import profitable
from adept_fx.runtime.stats import Stats


def test_nothing_live_always_pays_and_everything_live_never() -> None:
    for total in (1, 2, 8, 64, 4096):
        assert profitable(0, total)
        assert not profitable(total, total)


def test_fewer_live_tokens_pay_no_less() -> None:
    for total in (8, 64, 512):
        answers = [profitable(live, total) for live in range(1, total + 1)]
        assert answers == sorted(answers, reverse=True)


def test_small_decode_batches_run_dense_unless_all_left() -> None:
    assert not any(profitable(live, 8) for live in range(1, 9))


def test_stats_add_up_and_reset() -> None:
    stats = Stats((2, 4))
    stats.add("prefill", [6, 4], [2, 1], executed=30, needed=28, total=36)
    stats.add("decode", [1, 0], [1, 0], executed=2, needed=2, total=6)
    assert (stats.executed_token_layers, stats.needed_token_layers) == (32, 30)
    assert stats.total_token_layers == 42
    assert stats.per_exit[0]["prefill"] == {"seen": 6, "exited": 2}
    assert stats.as_dict()["decode"]["exited"] == [1, 0]
    assert "32 of 42" in repr(copy.deepcopy(stats))
    stats.reset()
    assert stats.total_token_layers == 0
