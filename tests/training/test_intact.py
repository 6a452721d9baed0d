"""What is as before when `fit` ends, whichever way it ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import Trainer

import adept_fx
from micro import changed, everything, settings, texts, weights


def _state(ee: Any) -> dict[str, Any]:
    adept = ee.adept
    return {
        "flags": [parameter.requires_grad for parameter in ee.parameters()],
        "dtypes": [parameter.dtype for parameter in ee.parameters()],
        "ids": [id(parameter) for parameter in ee.parameters()],
        "modes": [module.training for module in ee.modules()],
        "modules": {name: id(module) for name, module in ee.named_modules()},
        "plan": adept.plan,
        "thresholds": (adept.thresholds, adept.prefill_thresholds),
        "stats": (id(adept.stats), adept.stats.as_dict()),
        "depth": adept.last_depth,
        "hooks": [len(module._forward_hooks) for module in ee.modules()],
        "gradients": torch.is_grad_enabled(),
    }


@pytest.fixture
def used() -> Iterator[Any]:
    """A model whose settings are all unlike those that it is trained with."""
    ee = everything()
    ee.adept.plan, ee.adept.thresholds, ee.adept.prefill_thresholds = "compact", 0.3, (0.0, 0.7)
    ee.requires_grad_(False)
    ee.model.norm.requires_grad_(True)
    ee.adept.gates[1].bias.requires_grad_(True)
    with torch.no_grad():
        ee(texts(2, 0))
    ee.train()
    ee.model.layers[1].eval()
    yield ee
    ee.adept.plan, ee.adept.thresholds = "auto", 1.0
    ee.float()


def test_all_is_as_before(used: Any) -> None:
    before = _state(used)
    adept_fx.fit(used, texts(16, 1), settings())
    assert _state(used) == before


def test_a_promise_does_not_outlive_its_exits(used: Any) -> None:
    used.adept.calibration = {"target": 0.97}  # of the exits as they were
    adept_fx.fit(used, texts(16, 1), settings())
    assert used.adept.calibration is None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["training_step", "create_scheduler"])
def test_also_if_training_fails(
    used: Any, error: type[BaseException], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, parameters = _state(used), weights(used)
    original, calls = getattr(Trainer, where), []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 or where != "training_step":
            raise error("enough")
        return original(*args, **kwargs)

    monkeypatch.setattr(Trainer, where, fails)
    with pytest.raises(error, match="enough"):
        adept_fx.fit(used, texts(16, 1), settings())
    assert _state(used) == before
    assert all(name.startswith("adept.") for name in changed(used, parameters))


def test_also_if_a_forward_fails(used: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _state(used)

    def fails(*args: Any) -> Any:
        raise RuntimeError("enough")

    handle = used.adept.decoder.register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="enough"):
        adept_fx.fit(used, texts(16, 1), settings())
    handle.remove()
    assert _state(used) == before


def test_half_precision_comes_back() -> None:
    ee = everything()
    ee.to(torch.bfloat16)
    seen = []
    ee.adept.gates[0].register_forward_pre_hook(
        lambda module, args: seen.append((module.bias.dtype, args[0].hidden.dtype))
    )
    before = weights(ee)
    result = adept_fx.fit(ee, texts(16, 2), settings(gate_learning_rate=1e-5))
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    assert {parameter.dtype for parameter in ee.parameters()} == {torch.bfloat16}
    assert all(name.startswith("adept.") for name in changed(ee, before))
    assert result.last("loss") > 0
    ee.adept.gates[0]._forward_pre_hooks.clear()
    ee.float()


def test_gradients_and_doubles_are_kept() -> None:
    ee = everything()
    ee.adept.kv_maps.double()
    kept = torch.ones_like(ee.adept.gates[0].bias)
    ee.adept.gates[0].bias.grad = kept
    adept_fx.fit(ee, texts(16, 2), settings(train="gates"))
    assert ee.adept.gates[0].bias.grad is kept
    assert ee.adept.kv_maps.up.dtype == torch.float64
    ee.adept.gates[0].bias.grad = None
    ee.float()


@pytest.mark.parametrize("train", ["gates", "kv_maps"])
def test_it_trains_where_exits_and_gradients_are_off(train: str) -> None:
    ee = everything()
    before = weights(ee)
    with torch.no_grad(), ee.adept.disabled():
        adept_fx.fit(ee, texts(16, 3), settings(train=train))
        assert ee.adept._disabled == 1
    assert ee.adept._disabled == 0
    assert changed(ee, before)
