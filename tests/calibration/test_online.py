"""Thresholds that follow the texts, and the audits that tell them what happens."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from adept_fx.calibration.calibrate import calibrate
from adept_fx.calibration.online import BetaMixture, Mixture
from adept_fx.errors import ConfigError
from adept_fx.runtime.handle import Adept
from calibrated import Sees, decided, fresh, rewritten, texts


def _scores(count: int, low: float, high: float, seed: int = 0) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=torch.Generator().manual_seed(seed))


def _stream(mixture: Mixture, border: float, rounds: int = 40, seed: int = 0) -> float:
    """Tokens agree where their score is above a border, but for one of fifty."""
    for at in range(rounds):
        scores = _scores(100, 0.0, 1.0, seed + at)
        noise = _scores(100, 0.0, 1.0, 1000 + seed + at) < 0.02
        mixture.add(scores, (scores > border) ^ noise, keep=0.9995)
    return mixture.threshold(0.9)


def test_the_threshold_is_where_the_mixture_is_sure() -> None:
    mixture = Mixture(0.5, prior=1e-6)
    found = _stream(mixture, 0.6)
    assert 0.55 < found < 0.85
    own = mixture.own_threshold(0.9)
    assert found == pytest.approx(own, abs=1e-6)
    assert mixture.own_threshold(0.8) < own < mixture.own_threshold(0.95)


def test_a_handful_of_tokens_moves_nothing_much() -> None:
    mixture = Mixture(0.7, prior=256.0)
    assert mixture.threshold(0.97) == 0.7
    mixture.add(torch.tensor([0.95, 0.9, 0.99]), torch.tensor([False, False, False]), 0.9995)
    assert mixture.threshold(0.97) == pytest.approx(0.7, abs=0.01)


def test_it_follows_a_drift_both_ways() -> None:
    mixture = Mixture(0.6, prior=256.0)
    before = _stream(mixture, 0.5)
    harder = _stream(mixture, 0.8, rounds=80, seed=200)
    easier = _stream(mixture, 0.2, rounds=80, seed=500)
    assert harder > before + 0.05
    assert easier < before - 0.05


@pytest.mark.parametrize("agrees", [True, False])
def test_one_kind_alone_and_equal_scores(agrees: bool) -> None:
    mixture = Mixture(0.5, prior=1.0)
    for _ in range(30):
        mixture.add(torch.full((50,), 0.8), torch.full((50,), agrees), 0.9995)
    found = mixture.own_threshold(0.9)
    assert found < 0.8 if agrees else found > 0.8
    mixture.add(torch.empty(0), torch.empty(0, dtype=torch.bool), 0.9995)
    mixture.add(torch.tensor([torch.nan, 2.0, -1.0]), torch.tensor([True, True, False]), 0.9995)
    assert mixture.seen < 30 * 50 + 3
    assert 0.0 <= mixture.threshold(0.9) <= 1.0


@pytest.mark.parametrize(
    "options", [{"target": 1.0}, {"every": 0}, {"prior": 0.0}, {"keep": 1.5}], ids=str
)
def test_what_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="make no sense"):
        BetaMixture(options.pop("target", 0.9), {"decode": (0.5,)}, **options)


def _spied(online: BetaMixture) -> list[list[tuple[Tensor, Tensor]]]:
    """What the audits will see."""
    seen: list[list[tuple[Tensor, Tensor]]] = []
    update = online.update

    def spy(adept: Adept, phase: str, found: list[tuple[Tensor, Tensor]]) -> None:
        seen.append(found)
        update(adept, phase, found)

    vars(online)["update"] = spy
    return seen


@torch.no_grad()
def test_audits_run_everything_and_see_the_truth() -> None:
    ee = fresh()
    ee.adept.thresholds, ee.adept.prefill_thresholds = 0.1, 0.05
    ee.adept.online = online = BetaMixture(0.9, {"prefill": (0.05, 0.05)}, every=3)
    seen = _spied(online)
    ids = torch.stack(texts(2, length=9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with ee.adept.disabled():  # not counted
        full = ee(input_ids=ids, attention_mask=mask).logits
    for call in range(6):
        output = ee(input_ids=ids, attention_mask=mask)
        if call % 3 == 2:
            real = mask.bool()
            assert torch.allclose(output.logits[real], full[real], atol=1e-5)
            assert (ee.adept.last_depth[real] == 4).all()
        elif call < 2:
            assert (ee.adept.last_depth[mask.bool()] < 4).any()
    assert online.audits == {"prefill": 2}
    assert len(seen) == 2
    states = ee.model(input_ids=ids, attention_mask=mask)  # a call of the decoder counts, too
    assert states.last_hidden_state.shape == (2, 9, 32)
    for scores, agrees in seen[0]:
        assert scores.shape == agrees.shape == (14,)
        assert bool(agrees.any())
    assert ee.adept.thresholds == (0.1, 0.1)
    assert ee.adept.prefill_thresholds != (0.05, 0.05)
    before = ee.adept.prefill_thresholds
    ee.adept.online = None
    for _ in range(3):
        ee(input_ids=ids)
    assert ee.adept.prefill_thresholds == before


@torch.no_grad()
def test_what_an_audit_sees_is_what_the_exits_say() -> None:
    """Against hidden states of the plain model, through its own norm and head."""
    model = decided(after=1, left=0.15)
    ee = rewritten(model, gate=Sees())
    online = BetaMixture(0.9, {"decode": (0.5, 0.5)}, every=1)
    seen = _spied(online)
    ids = torch.stack(texts(3, length=6))
    cache = ee(input_ids=ids[:, :5], use_cache=True).past_key_values
    ee.adept.online = online
    ee(input_ids=ids[:, 5:], past_key_values=cache, use_cache=True)
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    final = model(input_ids=ids).logits[:, -1].argmax(-1)
    for (scores, agrees), exit_ in zip(seen[0], (1, 2), strict=True):
        state = states[exit_][:, -1]
        assert torch.allclose(scores, torch.sigmoid(state[:, 0]), atol=1e-5)
        assert torch.equal(agrees, model.lm_head(model.model.norm(state)).argmax(-1) == final)


def test_calibrate_leaves_one_there() -> None:
    ee = fresh()
    found = calibrate(ee, texts(90), target=0.75, batch_size=64, online="beta-mixture")
    online = ee.adept.online
    assert isinstance(online, BetaMixture)
    starts = {phase: tuple(m.start for m in all_) for phase, all_ in online.mixtures.items()}
    assert starts == {part.phase: part.thresholds for part in found.phases}
    assert online.every == 32
    again = pickle.loads(pickle.dumps(copy.deepcopy(online)))
    assert again.audits == online.audits
    online.every = 2
    ee.generate(torch.stack(texts(2)), max_new_tokens=9, do_sample=False)
    assert online.audits == {"prefill": 0, "decode": 4}
    calibrate(ee, texts(90), target=0.75, batch_size=64, phase="decode")
    assert ee.adept.online is None


def test_training_is_not_audited() -> None:
    ee = fresh()
    ee.adept.online = online = BetaMixture(0.9, {"prefill": (0.5, 0.5)}, every=1)
    ee.train()
    try:
        ee(input_ids=texts(1)[0][None], use_cache=False)
    finally:
        ee.eval()
        ee.adept.online = None
    assert online.audits == {"prefill": 0}


@pytest.mark.slow
@torch.no_grad()
def test_audits_of_compiled_models_compile_nothing() -> None:
    """The gates stay in their compiled stages."""
    from torch._dynamo.utils import counters

    ee = rewritten(decided(after=1, left=0.15), gate=Sees(), threshold=1.0)
    ee.adept.compile(backend="eager")
    ids = torch.stack(texts(2))
    for _ in range(2):
        ee(input_ids=ids)
    before = counters["stats"]["unique_graphs"]
    ee.adept.online = online = BetaMixture(0.9, {"prefill": (0.9, 0.9)}, every=1)
    ee(input_ids=ids)
    assert online.audits == {"prefill": 1}
    assert counters["stats"]["unique_graphs"] == before
