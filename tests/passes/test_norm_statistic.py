"""The norm statistic of skipped layers is computed once, whatever kind of norm."""

from __future__ import annotations

import pytest

import adept_fx
from models import tiny

STATISTIC = {"llama": "aten.rsqrt", "cohere": "aten.rsqrt", "gpt2": "layer_norm.default"}


@pytest.mark.parametrize("model_type", sorted(STATISTIC))
def test_the_statistic_is_computed_once(model_type: str) -> None:
    config = adept_fx.ExitConfig(exits=(1,), gate="linear")
    ee = adept_fx.transform(tiny(model_type, layers=5), config)
    assert ee.adept.graph.kv_0.graph.code.count(STATISTIC[model_type]) == 1
