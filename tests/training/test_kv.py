"""KV maps: later tokens differ less from the whole model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import adept_fx
from adept_fx.training.kv import KVLoss, random_exits
from micro import everything, rewritten, settings, texts
from models import tiny


@torch.no_grad()
def _divergence(ee: Any) -> float:
    """KL of tokens that run all layers, while half of the others leave at half depth."""
    ids = texts(48, 77)
    with ee.adept.disabled():
        wanted = ee(ids).logits.log_softmax(-1)
    with random_exits(ee.adept, 0.5, torch.Generator().manual_seed(3)):
        found = ee(ids).logits.log_softmax(-1)
    whole = ee.adept.last_depth == ee.adept.num_layers
    assert 0.4 < float(whole.float().mean()) < 0.6
    return float(F.kl_div(found[whole], wanted[whole], reduction="batchmean", log_target=True))


@pytest.mark.parametrize("kv", ["map", "map_per_layer"])
def test_later_tokens_get_nearer(kv: str) -> None:
    ee = rewritten(tiny("llama"), exits=(2,), kv=kv, kv_rank=16)
    before = _divergence(ee)
    options = settings(
        steps=60, batch_size=8, tokens_per_step=256, train="kv_maps", learning_rate=1e-2,
        trainer={"logging_steps": 60},
    )  # fmt: skip
    result = adept_fx.fit(ee, texts(480, 9), options)
    assert _divergence(ee) < 0.7 * before
    assert result.last("kv_error") > 0


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_batch_in_which_nobody_or_everybody_leaves(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ee = everything()
    loss = KVLoss(ee, 0.1, 64, torch.Generator())
    real = random_exits
    monkeypatch.setattr(
        "adept_fx.training.kv.random_exits", lambda adept, _, chance: real(adept, share, chance)
    )
    ids = texts(2, 1)
    total, log = loss({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    total.backward()
    assert float(log["kv_kl"]) == pytest.approx(0.0, abs=1e-9)
    assert (float(log["kv_error"]) > 0) == (share > 0)


def test_windows_and_padding() -> None:
    ee = rewritten(tiny("gemma3_text", layers=3), exits=(1,), kv="map")
    ragged = [texts(1, at)[0, : 5 + 3 * at] for at in range(8)]
    result = adept_fx.fit(ee, ragged, settings(steps=2, train="kv_maps"))
    assert 0 < result.last("kv_error") < 10
    assert bool((ee.adept.kv_maps.up != 0).any())
