"""The compiled form of a model computes what the eager one does, whatever leaves where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import adept_fx
from adept_fx.gates import Gate, GateInputs, Replay
from models import tiny

EXITS, STEPS, PROMPT = (1, 2, 3), 3, 6


def _scores(batch: int, seed: int, exits: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(exits, batch, PROMPT), *[(exits, batch, 1)] * STEPS]
    return [torch.rand(*shape, generator=generator) for shape in shapes]


@torch.no_grad()
def _talk(ee: Any, batch: int, static: bool, padded: bool, plan: str, threshold: float) -> Any:
    """Logits of a prompt and of some steps, at real tokens, and the cache."""
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(3, 100, (batch, PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, : PROMPT // 2] = 0
    ee.adept.plan, ee.adept.thresholds = plan, threshold
    ee.adept.set_gates(Replay(_scores(batch, batch, len(ee.adept.config.exit_layers))))
    space = PROMPT + STEPS + 1
    cache: Any = (
        StaticCache(config=ee.config, max_cache_len=space)
        if static
        else DynamicCache(config=ee.config)
    )
    found = [ee(ids, attention_mask=mask, past_key_values=cache).logits * mask[..., None]]
    for _ in range(STEPS):
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        step = torch.randint(3, 100, (batch, 1), generator=generator)
        places = mask.sum(1, keepdim=True) - 1
        out = ee(step, attention_mask=mask, position_ids=places, past_key_values=cache)
        found.append(out.logits)
    return found, ee.adept.last_depth


# Rows, static cache, padding, plan, threshold.
CASES = (
    (3, False, True, "compact", 0.5),
    (3, True, False, "dense", 0.8),
    (1, True, False, "compact", 0.5),
    (2, True, False, "auto", 0.0),  # all leave at the first exit: one function does the rest
)
FEW = CASES[:1]


@pytest.mark.parametrize(
    ("model_type", "exits", "cases"),
    [
        ("llama", EXITS, CASES),
        pytest.param("gemma3_text", (2,), FEW, marks=pytest.mark.slow),
        pytest.param("bloom", (2,), FEW, marks=pytest.mark.slow),
    ],
)
def test_every_layout(model_type: str, exits: tuple[int, ...], cases: Any) -> None:
    """Llama's stages share their graphs; Gemma's layers differ, Bloom attends by itself."""
    config = adept_fx.ExitConfig(exits=exits, gate=Replay([]), threshold=0.5)
    ee = adept_fx.transform(tiny(model_type), config)
    expected = [_talk(ee, *case) for case in cases]
    ee.adept.compile(backend="eager")
    for case, (logits, depth) in zip(cases, expected, strict=True):
        found, found_depth = _talk(ee, *case)
        assert torch.equal(depth, found_depth), case
        for a, b in zip(logits, found, strict=True):
            assert (a - b).abs().max() <= 1e-5 * a.abs().max(), case


class PerToken(Gate):
    """Lets tokens leave by what they hold, and notes how many it was given."""

    per_token = True

    def forward(self, tokens: GateInputs) -> Tensor:
        return torch.sigmoid(tokens.hidden.float().sum(-1) * (tokens.exit_index + 1))


class Alone(PerToken):
    """Another forward makes no promise: it is called with live tokens only."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, tokens: GateInputs) -> Tensor:
        self.seen.append(tokens.hidden.shape[0])
        return torch.zeros(tokens.hidden.shape[0])


@torch.no_grad()
@pytest.mark.parametrize("plan", ["dense", "compact"])
def test_gates_inside_a_stage_decide_as_they_do_outside(plan: str) -> None:
    config = adept_fx.ExitConfig(exits=EXITS, gate=PerToken(), threshold=0.6)
    ee = adept_fx.transform(tiny("llama"), config)
    ids = torch.randint(3, 100, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    ee.adept.plan = plan
    expected, depth = ee(ids, attention_mask=mask).logits, ee.adept.last_depth
    assert len(set(depth.flatten().tolist())) > 3
    ee.adept.compile(backend="eager")
    found = ee(ids, attention_mask=mask).logits
    assert torch.equal(ee.adept.last_depth, depth)
    real = mask.bool()
    assert (found - expected)[real].abs().max() <= 1e-5 * expected[real].abs().max()


@torch.no_grad()
def test_other_gates_see_live_tokens_alone() -> None:
    gate = Alone()
    assert not gate.per_token
    config = adept_fx.ExitConfig(exits=(2,), gate=gate, threshold=0.6)
    ee = adept_fx.transform(tiny("llama"), config)
    ee.adept.compile(backend="eager")
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    ee(torch.ones(2, 4, dtype=torch.long), attention_mask=mask)
    assert gate.seen == [6]


@torch.no_grad()
@pytest.mark.slow
def test_under_an_outer_compile() -> None:
    """The host decides; inside `generate` with a static cache, too."""
    config = adept_fx.ExitConfig(exits=EXITS, gate=Replay([]), threshold=0.5)
    ee = adept_fx.transform(tiny("llama"), config)
    ids = torch.randint(3, 100, (2, PROMPT), generator=torch.Generator().manual_seed(2))
    plain = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}

    def tokens() -> Tensor:
        ee.adept.set_gates(Replay(_scores(2, 5)))
        out: Tensor = ee.generate(ids, cache_implementation="static", **plain)
        return out

    expected = tokens()
    ee.adept.set_gates(Replay(_scores(2, 5)[:1]))
    logits = ee(ids).logits
    outer = torch.compile(ee, backend="eager")
    ee.adept.set_gates(Replay(_scores(2, 5)[:1]))
    assert torch.allclose(outer(ids).logits, logits, atol=1e-5)
    ee.adept.compile(backend="eager")
    ee.compile(backend="eager")
    assert torch.equal(tokens(), expected)


@torch.no_grad()
@pytest.mark.slow
def test_every_exit_has_its_own_gate() -> None:
    """Equal stages share a compiled function, by inductor too; their gates' numbers differ."""
    config = adept_fx.ExitConfig(exits=EXITS, gate="mlp", threshold=0.5)
    ee = adept_fx.transform(tiny("llama"), config)
    for seed, gate in enumerate(ee.adept.gate_list()):
        generator = torch.Generator().manual_seed(seed)
        torch.nn.init.normal_(gate.weight, std=0.5, generator=generator)
        torch.nn.init.constant_(gate.bias, -2.0)
    ids = torch.randint(3, 100, (3, PROMPT), generator=torch.Generator().manual_seed(0))
    places = torch.arange(PROMPT).expand(ids.shape)
    want = ee(ids, position_ids=places).logits
    depth = ee.adept.last_depth
    assert len(depth.unique()) > 2
    ee.adept.compile()
    got = ee(ids, position_ids=places).logits
    assert torch.equal(ee.adept.last_depth, depth)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
