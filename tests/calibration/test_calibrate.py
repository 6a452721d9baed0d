"""`adept_fx.calibrate` end to end: what it promises, what it sets, what it leaves alone."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import adept_fx
from adept_fx import files
from adept_fx.calibration import statistics as stats
from adept_fx.calibration.calibrate import calibrate
from adept_fx.calibration.trial import Trial
from adept_fx.errors import ConfigError, InputError, UnsupportedModelError
from calibrated import EXITS, Says, Sees, decided, fresh, rewritten, texts
from classify import classifier
from models import tiny, tiny_config

NEVER = (1.0, 1.0)
LOOSE: dict[str, Any] = {"target": 0.75, "batch_size": 64}


@torch.no_grad()
def test_both_phases_and_what_is_left_alone() -> None:
    ee = rewritten(decided(after=1, left=0.15), threshold=0.9, prefill_threshold=0.8)
    ee(input_ids=texts(1)[0][None])
    before, depth = ee.adept.stats.as_dict(), ee.adept.last_depth
    ee.train()
    ee.model.norm.eval()
    found = calibrate(ee, texts(90), **LOOSE)
    assert ee.training
    assert not ee.model.norm.training
    assert ee.adept.stats.as_dict() == before
    assert ee.adept.last_depth is depth
    assert [part.phase for part in found.phases] == ["prefill", "decode"]
    for part in found.phases:
        assert part.certified
        assert (part.selected_on, part.certified_on) == (30, 60)
        assert 0.0 < part.saved < 1.0
        assert part.risk is not None
        assert part.bound is not None
        assert part.risk < part.bound <= 0.25
        passed = [item.passed for item in part.curve if item.tested]
        assert all(passed[:-1])
        assert all(len(losses) == 60 for losses in part.losses)
        savings = [item.saved for item in part.curve if item.passed]
        assert part.saved == savings[-1] > savings[0]
    assert ee.adept.prefill_thresholds == found.phase("prefill").thresholds != NEVER
    assert ee.adept.thresholds == found.phase("decode").thresholds != NEVER
    assert ee.adept.calibration == found.to_dict()
    assert ee.adept.online is None


@torch.no_grad()
def test_the_promise_holds_on_other_texts() -> None:
    ee = fresh()
    part = calibrate(ee, texts(150), phase="prefill", target=0.8, batch_size=64).phase("prefill")
    other = torch.stack(texts(600, seed=7))
    with ee.adept.disabled():
        full = ee(input_ids=other).logits.argmax(-1)
    ee.adept.stats.reset()
    risk = (ee(input_ids=other).logits.argmax(-1) != full).float().mean()
    assert 0.0 < risk <= 0.2
    saved = 1 - ee.adept.stats.needed["prefill"] / ee.adept.stats.total["prefill"]
    assert saved == pytest.approx(part.saved, abs=0.05)


def test_where_all_agree_everybody_leaves() -> None:
    """Layers from 1 on change nothing: nobody can lose anything."""
    ee = fresh("certain", Sees())
    found = calibrate(ee, texts(60), target=0.9, batch_size=64)
    for part in found.phases:
        assert part.thresholds[0] == 0.0
        assert (part.risk, part.saved) == (0.0, 0.75)


def test_only_the_exit_that_agrees_is_used() -> None:
    ee = rewritten(decided(after=2), gate=[Says(0.9), Says(0.6)])
    part = calibrate(ee, texts(60), target=0.9, phase="prefill").phase("prefill")
    assert part.thresholds[0] > 0.85 > 0.5 > part.thresholds[1]
    assert (part.risk, part.saved) == (0.0, 0.5)


def test_the_other_phase_is_untouched() -> None:
    ee = fresh("certain", Sees())
    ee.adept.prefill_thresholds = (0.95, 0.9)
    calibrate(ee, texts(60), target=0.9, phase="decode", batch_size=64)
    assert ee.adept.prefill_thresholds == (0.95, 0.9)
    assert ee.adept.thresholds[0] == 0.0
    ee.adept.thresholds, ee.adept.prefill_thresholds = (0.9, 0.9), NEVER
    found = calibrate(ee, texts(60), target=0.9, phase="prefill", batch_size=64)
    assert ee.adept.thresholds == (0.9, 0.9)
    assert ee.adept.prefill_thresholds[0] == 0.0
    assert list(found.to_dict()["phases"]) == ["prefill"]


@torch.no_grad()
def test_losses_by_hand() -> None:
    """Against single calls of the same model; texts of several lengths share no call."""
    ee = fresh()
    data = [*texts(5), *texts(4, length=7, seed=1), *texts(1, length=9)]
    bars = (0.12, 0.1)
    for risk in ("agreement", "nll"):
        trial = Trial(ee, data, risk, batch_size=3)
        for phase in ("prefill", "decode"):
            order = [9, 0, 6, 1, 8, 2, 3]
            losses, _ = trial.measure(phase, bars, order)
            expected = [_loss(ee, data[at], phase, risk) for at in order]
            assert losses.tolist() == pytest.approx(expected, abs=1e-5)
            assert losses.sum() > 0


def _loss(ee: Any, text: Tensor, phase: str, risk: str) -> float:
    start = 0 if phase == "prefill" else len(text) // 2
    early = _said(ee, text, phase)[start:]
    with ee.adept.disabled():
        full = ee(input_ids=text[None]).logits[0][start:]
    if risk == "agreement":
        return float((early.argmax(-1) != full.argmax(-1)).float().mean())
    after = text[start + 1 :]
    now, before = (torch.nn.functional.cross_entropy(x[:-1], after) for x in (early, full))
    return float(((now - before) / before).clamp(0, 1))


def _said(ee: Any, text: Tensor, phase: str) -> Tensor:
    if phase == "prefill":
        logits: Tensor = ee(input_ids=text[None]).logits[0]
        return logits
    half = len(text) // 2
    output = ee(input_ids=text[None, :half], use_cache=True)
    found = [output.logits[0]]
    for at in range(half, len(text)):
        cache = output.past_key_values
        output = ee(input_ids=text[None, at : at + 1], past_key_values=cache, use_cache=True)
        found.append(output.logits[0])
    return torch.cat(found)


def test_the_callers_own_risk() -> None:
    shapes = set()

    def differs(early: Tensor, full: Tensor, ids: Tensor) -> Tensor:
        shapes.add((tuple(early.shape), tuple(full.shape), tuple(ids.shape)))
        return (early.argmax(-1) != full.argmax(-1)).double().mean()

    ee = fresh()
    named = calibrate(ee, texts(90), **LOOSE)
    own = calibrate(ee, texts(90), risk=differs, **LOOSE)
    assert own.risk_name == "differs"
    assert [part.curve for part in own.phases] == [part.curve for part in named.phases]
    assert shapes == {((s, 128), (s, 128), (s,)) for s in (12, 6)}


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan, "much", None, torch.ones(2)])
def test_a_risk_outside_of_its_range(value: Any) -> None:
    ee = fresh()
    with pytest.raises(ConfigError, match="returned"):
        calibrate(ee, texts(9), risk=lambda early, full, ids: value)
    assert ee.adept.thresholds == ee.adept.prefill_thresholds == (0.9, 0.9)
    assert ee.adept.calibration is None


@pytest.mark.parametrize("count", [1, 2, 20])
def test_too_few_texts_promise_nothing(count: int) -> None:
    """Without any mistake, 99 texts must certify 3 %: 149 in all."""
    ee = fresh("certain", Sees())
    with pytest.warns(UserWarning, match=f"{count} texts cannot support .* about 149 ") as seen:
        found = calibrate(ee, texts(count))
    assert len(seen) == 2
    assert Path(seen[0].filename).name == "test_calibrate.py"
    assert ee.adept.thresholds == ee.adept.prefill_thresholds == NEVER
    for part in found.phases:
        assert (part.saved, part.risk, part.texts_needed) == (0.0, None, 149)
    assert "149" in str(found)


@pytest.mark.parametrize("score", [0.0, math.nan])
@pytest.mark.filterwarnings("ignore:gate Says returned NaN")
def test_gates_that_let_nobody_go(score: float) -> None:
    ee = fresh("random", Says(score))
    with pytest.warns(UserWarning, match="prefill: nothing that these gates could save"):
        found = calibrate(ee, texts(9), phase="prefill")
    assert found.phase("prefill").curve == ()
    assert ee.adept.prefill_thresholds == NEVER


def test_exits_that_all_disagree() -> None:
    """What leaves is wrong, and a gate that cannot choose lets all go."""
    ee = fresh("random", Says(1.0))
    with pytest.warns(UserWarning, match="nothing that these gates could save"):
        calibrate(ee, texts(30), phase="prefill")
    assert ee.adept.prefill_thresholds == NEVER


def test_a_prefill_that_breaks_the_promise_of_decoding() -> None:
    ee = fresh("random", Sees())
    ee.adept.prefill_thresholds = 0.0
    with pytest.warns(UserWarning, match="decode: nothing"):
        calibrate(ee, texts(30), phase="decode")
    assert ee.adept.prefill_thresholds == (0.0, 0.0)


def test_short_texts() -> None:
    ee = fresh("certain", Sees())
    data = [*texts(60, length=2), *texts(45)]
    found = calibrate(ee, data, target=0.9, batch_size=64)
    assert sum((found.phase("prefill").selected_on, found.phase("prefill").certified_on)) == 105
    assert sum((found.phase("decode").selected_on, found.phase("decode").certified_on)) == 45
    with pytest.raises(InputError, match="no text is long enough for decode"):
        calibrate(ee, data[:60], target=0.9, batch_size=64)
    pieces = calibrate(ee, texts(20), length=4, target=0.9, phase="prefill").phase("prefill")
    assert pieces.selected_on + pieces.certified_on == 60


def test_a_stricter_target_saves_less_and_a_seed_decides() -> None:
    ee = fresh()
    saved, chosen = [], []
    for target in (0.95, 0.9, 0.8):
        with warnings.catch_warnings(action="ignore"):
            found = calibrate(ee, texts(90), target=target, batch_size=64, phase="prefill")
        saved.append(found.phase("prefill").saved)
    assert saved == sorted(saved)
    assert saved[-1] > 0
    for seed in (0, 0, 1):
        found = calibrate(ee, texts(90), target=0.8, batch_size=64, phase="prefill", seed=seed)
        chosen.append(found.phase("prefill").curve)
    assert chosen[0] == chosen[1] != chosen[2]


def test_betting_promises_no_less_here() -> None:
    ee = fresh()
    both = [
        calibrate(ee, texts(90), bound=bound, phase="prefill", **LOOSE).phase("prefill").saved
        for bound in stats.BOUNDS
    ]
    assert both[0] <= both[1]


@torch.no_grad()
def test_the_promise_is_rarely_broken_on_a_model() -> None:
    """200 samples of 60 out of 400 texts, whose losses by seven candidates are all known."""
    ee, alpha = fresh("random"), 0.25
    data = texts(400, length=8)
    trial = Trial(ee, data, "agreement", batch_size=100)
    bars = [(1.0, 1.0 - at) for at in (0.7, 0.75, 0.78, 0.8, 0.83, 0.88, 0.93)]
    losses = torch.stack([trial.measure("prefill", item, range(400))[0] for item in bars])
    risks = losses.mean(1)
    assert risks[0] < alpha < risks[-1]
    broken = kept = 0
    for seed in range(200):
        which = torch.randint(400, (60,), generator=torch.Generator().manual_seed(seed))
        count = stats.passed(stats.fixed_sequence(losses[:, which], alpha, 0.05), 0.05)
        broken += bool(count) and bool(risks[count - 1] > alpha)
        kept += bool(count)
    assert broken / 200 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)
    assert kept > 100


@pytest.mark.slow
def test_compiled_models_stay_compiled() -> None:
    """With gates that run inside of the compiled stages."""
    ee = rewritten(decided(after=1, left=0.15), gate=Sees())
    plain = calibrate(ee, texts(45, length=8), **LOOSE)
    ee.adept.compile(backend="eager")
    program = ee.adept._program()
    found = calibrate(ee, texts(45, length=8), **LOOSE)
    assert ee.adept._program() is program
    assert program.graph.stage_0.compiled
    for one, other in zip(found.phases, plain.phases, strict=True):
        assert one.certified
        assert one.thresholds == pytest.approx(other.thresholds, abs=1e-4)
        assert one.saved == pytest.approx(other.saved)


def test_rows_of_a_sequence_classifier() -> None:
    model: Any = classifier("llama")
    ee = adept_fx.transform(model, adept_fx.ExitConfig(exits=EXITS, gate="max_prob"))
    seen = set()

    def risk(early: Tensor, full: Tensor, ids: Tensor) -> float:
        seen.add((tuple(early.shape), tuple(full.shape), tuple(ids.shape)))
        return float(early.argmax() != full.argmax())

    data = [{"input_ids": text.tolist()} for text in texts(90)]
    found = calibrate(ee, data, target=0.6)
    part = found.phase("prefill")
    assert [item.phase for item in found.phases] == ["prefill"]
    assert part.certified
    assert part.saved > 0
    assert all(loss in (0.0, 1.0) for losses in part.losses for loss in losses)
    assert ee.adept.prefill_thresholds == part.thresholds
    assert calibrate(ee, data, target=0.6, risk=risk).phase("prefill").losses == part.losses
    assert seen == {((3,), (3,), (12,))}
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"phase": "decode"}, "does not decode"),
        ({"risk": "nll"}, "predicts next tokens"),
        ({"online": "beta-mixture"}, "needs a language model"),
    )
    for options, message in refused:
        with pytest.raises(ConfigError, match=message):
            calibrate(ee, data, **options)


def test_other_heads() -> None:
    ee = adept_fx.transform(classifier("llama", "tokens"), adept_fx.ExitConfig(exits=EXITS))
    with pytest.warns(UserWarning, match="prefill"):
        assert len(calibrate(ee, texts(9)).phases) == 1
    config = tiny_config("llama", num_labels=1)
    one = rewritten(AutoModelForSequenceClassification.from_config(config).eval(), gate=Sees())
    with pytest.raises(ConfigError, match="nothing can disagree"):
        calibrate(one, texts(9))
    with pytest.raises(UnsupportedModelError, match="no logits"):
        calibrate(rewritten(tiny("llama").model, gate=Sees()), texts(9))
    with pytest.raises(UnsupportedModelError, match="not made by"):
        calibrate(tiny("llama"), texts(9))


@pytest.mark.parametrize(
    "options",
    [
        {"target": 1.0},
        {"target": math.nan},
        {"confidence": 0.0},
        {"phase": "both"},
        {"length": 1},
        {"batch_size": 0},
        {"bound": "clt"},
        {"online": "always"},
        {"risk": "regret"},
        {"risk": 0.5},
    ],
    ids=str,
)
def test_what_is_refused(options: dict[str, Any]) -> None:
    ee = fresh()
    with pytest.raises(ConfigError):
        calibrate(ee, texts(3), **options)


def test_data_that_is_refused() -> None:
    ee = fresh()
    with pytest.raises(InputError, match="the dataset is empty"):
        calibrate(ee, [[5]])
    with pytest.raises(InputError, match="holds no token ids"):
        calibrate(ee, ["text"])
    with ee.adept.disabled(), pytest.raises(ConfigError, match="no token can leave"):
        calibrate(ee, texts(3))


def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ee = fresh()
    found = adept_fx.calibrate(ee, texts(90), **LOOSE)
    kept = json.loads(json.dumps(found.to_dict()))
    assert kept == found.to_dict()
    assert kept["phases"]["decode"]["thresholds"] == list(ee.adept.thresholds)
    assert "losses" not in kept["phases"]["decode"]["curve"][0]
    whole = found.to_dict(losses=True)["phases"]["decode"]["curve"][0]["losses"]
    assert whole == found.phase("decode").losses[0]
    assert "with 95% confidence the risk (agreement) is at most 25.00%" in " ".join(
        str(found).split()
    )
    assert "chosen" in str(found)
    with pytest.raises(KeyError):
        found.phase("training")
    monkeypatch.setattr(files, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="matplotlib"):
        found.plot(tmp_path / "x.png")


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = calibrate(fresh(), texts(60), **LOOSE)
    found.plot(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
