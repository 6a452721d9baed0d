"""`adept_fx.calibrate`: risks of the caller's own, other heads, what is refused, and reports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import adept_fx
from adept_fx import files
from adept_fx.calibration.calibrate import calibrate
from adept_fx.capture import capture
from adept_fx.errors import ConfigError, InputError, UnsupportedModelError
from adept_fx.gates import Cosine
from adept_fx.runtime import decoder
from calibrated import EXITS, Sees, fresh, rewritten, texts
from classify import classifier
from models import tiny, tiny_config

LOOSE: dict[str, Any] = {"target": 0.75, "batch_size": 64}


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


def test_one_form_of_call_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    ee, forms = fresh(), []

    def counted(*args: Any, **keywords: Any) -> Any:
        forms.append(keywords)
        return capture(*args, **keywords)

    monkeypatch.setattr(decoder, "capture", counted)
    ee.adept.set_gates(Cosine())  # asks for more of the graph than the gates before
    calibrate(ee, texts(90), phase="prefill", **LOOSE)
    assert len(forms) == 1
