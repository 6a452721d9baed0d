"""Checkpoints, and what else the Trainer brings along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import adept_fx
from adept_fx.errors import ConfigError
from micro import changed, everything, settings, texts, weights


def _losses(result: Any) -> list[float]:
    return [entry["loss"] for entry in result.history if "loss" in entry]


@pytest.mark.slow
def test_training_goes_on_from_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = settings(steps=8, output_dir=tmp_path, trainer={"save_steps": 3})
    original, calls = Trainer.training_step, []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("enough")
        return original(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", fails)
    with pytest.raises(RuntimeError, match="enough"):
        adept_fx.fit(everything(), texts(32, 0), options)
    found = {file.name for file in (tmp_path / "exits").iterdir()}
    assert found == {"checkpoint-3", "adept_fx.json"}
    size = sum(f.stat().st_size for f in (tmp_path / "exits" / "checkpoint-3").glob("model*"))
    ee = everything()
    exits = sum(p.numel() for p in ee.adept.parameters())
    assert 4 * exits <= size < 4 * exits + 4000  # the model itself is not in it
    calls[:] = [0] * 100
    result = adept_fx.fit(ee, texts(32, 0), options)
    assert len(calls) == 105  # five steps of eight
    trained = weights(ee)
    assert result.steps == 8
    assert [entry["step"] for entry in result.history if "loss" in entry] == [*range(1, 9)]
    other = everything()
    again = adept_fx.fit(other, texts(32, 0), options)  # nothing is left to be done
    assert (len(calls), again.steps) == (105, 8)
    assert not changed(other, trained)


def test_checkpoints_of_something_else_are_refused(tmp_path: Path) -> None:
    options = {"steps": 1, "output_dir": tmp_path}
    adept_fx.fit(everything(), texts(4, 0), settings(train="gates", **options))
    with pytest.raises(ConfigError, match="holds checkpoints of another model"):
        adept_fx.fit(everything(), texts(4, 0), settings(**options))


def test_accumulated_gradients_have_the_same_scale() -> None:
    found = []
    for size, accumulated in ((8, 1), (4, 2)):
        trainer = {"gradient_accumulation_steps": accumulated, "max_grad_norm": 1e9}
        options = settings(
            batch_size=size, steps=3, tokens_per_step=999, train="adapters", trainer=trainer
        )
        # All texts are one: it does not matter which of them a step is given.
        result = adept_fx.fit(everything(), texts(1, 0).expand(24, -1), options)
        found.append(result.history)
    for one, two in zip(*found, strict=True):
        for name in {"loss", "grad_norm"} & one.keys():
            assert one[name] == pytest.approx(two[name], rel=1e-3)


def test_mixed_precision() -> None:
    seen = []
    ee = everything()
    hook = ee.adept.gates[0].register_forward_pre_hook(
        lambda module, args: seen.append(torch.is_autocast_enabled("cpu"))
    )
    result = adept_fx.fit(ee, texts(16, 0), settings(trainer={"bf16": True}))
    hook.remove()
    assert all(seen)
    exact = adept_fx.fit(everything(), texts(16, 0), settings())
    assert _losses(result) == pytest.approx(_losses(exact), rel=0.1)
    assert _losses(result) != _losses(exact)


def test_logging_steps_and_means() -> None:
    each = adept_fx.fit(everything(), texts(16, 0), settings())
    two = adept_fx.fit(everything(), texts(16, 0), settings(trainer={"logging_steps": 2}))
    steps = [entry for entry in each.history if "loss" in entry]
    for at, entry in enumerate(entry for entry in two.history if "loss" in entry):
        for name in ("loss", "gate_loss_1", "kl_2", "kv_kl"):
            mean = sum(e[name] for e in steps[2 * at : 2 * at + 2]) / 2
            assert entry[name] == pytest.approx(mean, rel=1e-3)


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "curves.png"
    adept_fx.fit(everything(), texts(16, 0), settings(plot=file))
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.stat().st_size > 10_000
