"""The example's own training runs tokens as the rewritten model does."""

from __future__ import annotations

from typing import Any

import torch

import adept_fx
from _train import draw_depths, logits_of
from adept_fx import ExitConfig
from adept_fx.gates import Replay
from models import tiny

EXITS, LAYERS = (1, 3), 4


def test_tokens_leave_in_training_as_they_do_at_run_time() -> None:
    torch.manual_seed(0)
    model: Any = tiny("llama", layers=LAYERS, attn_implementation="eager")
    ids = torch.randint(3, 60, (4, 12))
    depths = draw_depths(ids.shape, EXITS, LAYERS, share=0.4)
    assert set(depths.unique().tolist()) == {*EXITS, LAYERS}
    scores = torch.stack([(depths == exit_layer).float() for exit_layer in EXITS])
    ee = adept_fx.transform(model, ExitConfig(exits=EXITS, gate=Replay([scores]), threshold=0.5))
    expected = ee(ids, use_cache=False).logits
    assert torch.equal(ee.adept.last_depth, depths)
    last, early = logits_of(model, ids, depths, exit_layer=EXITS[0])
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4)
    gone = depths == EXITS[0]
    assert torch.equal(early[gone], last[gone])
    assert not torch.equal(early[~gone], last[~gone])


def test_in_every_other_text_nobody_leaves() -> None:
    torch.manual_seed(0)
    depths = draw_depths(torch.Size((6, 400)), EXITS, LAYERS, share=0.5)
    assert (depths[::2] == LAYERS).all()
    assert (depths[1::2] < LAYERS).any(1).all()
    model: Any = tiny("llama")
    ids = torch.randint(3, 60, (2, 9))
    plain, _ = logits_of(model, ids, None, exit_layer=2)
    torch.testing.assert_close(plain, model(ids).logits, rtol=1e-4, atol=1e-4)
