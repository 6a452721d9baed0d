"""LayerSkip's recipe through LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer

import adept_fx
from adept_fx.errors import ConfigError
from adept_fx.training.backbone import Backbone, dropout_share, layers_of
from micro import LAYERS, changed, rewritten, settings, texts, trained, weights
from models import tiny

pytest.importorskip("peft")


def _lora(**options: Any) -> Any:
    options = {"backbone": "lora", "lora_rank": 8, "backbone_learning_rate": 5e-3} | options
    return settings(**options)


@torch.no_grad()
def _early_loss(ee: Any) -> float:
    """Of the exit after the first layer, on texts that were not trained on."""
    ids, seen = texts(32, 99), []
    hook = ee.adept.gates[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ee(ids)
    hook.remove()
    logits = ee.adept.early_logits(seen[0].hidden, 0).view(*ids.shape, -1)
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def _shape(model: Any) -> list[tuple[str, type, int]]:
    return [(name, type(module), id(module)) for name, module in model.named_modules()]


@pytest.mark.slow
def test_the_model_gets_better_at_leaving_early() -> None:
    model = trained()
    ee = rewritten(model, gate="max_prob")
    model.model.embed_tokens.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in ee.parameters()]
    shapes, early, before = (_shape(model), _shape(ee)), _early_loss(ee), weights(model)
    with torch.no_grad():
        logits = ee(texts(4, 5)).logits
    result = adept_fx.fit(ee, texts(400, 1), _lora(steps=40, batch_size=8))
    assert (result.parts, result.history, result.steps) == ((), [], 40)
    names = {name for entry in result.backbone for name in entry}
    assert {"last_loss", "early_loss_1", "early_loss_2"} <= names
    assert _early_loss(ee) < 0.92 * early
    assert (_shape(model), _shape(ee)) == shapes
    assert [parameter.requires_grad for parameter in ee.parameters()] == flags
    assert not hasattr(model, "peft_config")
    found = changed(model, before)
    assert len(found) == LAYERS * 7
    assert all("proj" in name for name in found)
    # The same object, and the model that it was made of, see the new weights.
    with torch.no_grad():
        now = ee(texts(4, 5)).logits
        assert torch.equal(now, model(texts(4, 5)).logits)
    assert not torch.equal(now, logits)


@pytest.mark.slow
def test_exits_follow_and_seeds_decide() -> None:
    found: list[Any] = []
    for _ in range(2):
        torch.manual_seed(len(found))
        ee = rewritten(tiny("llama", layers=2), exits=(1,), adapter_rank=2)
        result = adept_fx.fit(ee, texts(16, 1), _lora(steps=2, backbone_steps=3))
        assert result.parts == ("gates", "adapters")
        assert result.backbone[-1]["step"] == 3
        assert result.history[-1]["step"] == 2
        found.append(weights(ee))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.slow
def test_a_model_whose_training_failed_is_as_before(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("gpt2", layers=2)  # its head is its embedding, its linear layers are transposed
    ee = rewritten(model, exits=(1,), gate="max_prob")
    shapes, before = (_shape(model), _shape(ee)), weights(model)
    flags = [parameter.requires_grad for parameter in ee.parameters()]
    options = _lora(steps=4, output_dir=tmp_path, trainer={"save_steps": 2})
    original, calls = Trainer.training_step, []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", fails)
    with pytest.raises(KeyboardInterrupt):
        adept_fx.fit(ee, texts(16, 1), options)
    assert (_shape(model), _shape(ee)) == shapes
    assert not changed(model, before)
    assert [parameter.requires_grad for parameter in ee.parameters()] == flags
    result = adept_fx.fit(ee, texts(16, 1), options)
    assert len(calls) == 4 + 2  # from the second step on
    assert result.steps == 4
    assert changed(model, before)
    with pytest.raises(ConfigError, match="holds checkpoints of another model"):
        adept_fx.fit(ee, texts(16, 1), options)  # LoRA of the weights before would be added twice


def test_half_precision_is_merged() -> None:
    model = tiny("llama", torch.bfloat16, layers=2)
    ee = rewritten(model, exits=(1,), gate="max_prob")
    before = weights(model)
    adept_fx.fit(ee, texts(16, 1), _lora(backbone_learning_rate=5e-2))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert changed(model, before)


def test_layers_are_dropped_for_some_texts() -> None:
    assert [dropout_share(at, 5) for at in range(5)] == pytest.approx(
        [0.0, 0.1892, 0.4142, 0.6818, 1.0], abs=1e-4
    )
    model = tiny("llama", layers=4)
    ee = rewritten(model, exits=(2,), gate="max_prob")
    backbone = Backbone(model, ee, _lora(layer_dropout=0.9))
    rows, dropped = 8, torch.zeros(4, dtype=torch.long)
    seen: list[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
        for layer in layers_of(ee)
    ]
    hooks = [len(layer._forward_hooks) for layer in layers_of(ee)]
    for step in range(25):
        seen.clear()
        with torch.no_grad(), backbone._hooks(2, rows) as states:
            model.model(texts(rows, step), use_cache=False)
        assert torch.equal(states[0], seen[2])
        for at in range(3):
            same = (seen[at] == seen[at + 1]).flatten(1)
            assert bool((same.all(1) | ~same.any(1)).all())  # whole rows or nothing
            dropped[at] += same.all(1).sum()
    for handle in handles:
        handle.remove()
    share = dropped[:3] / (25 * rows)
    wanted = torch.tensor([0.9 * dropout_share(at, 4) for at in range(3)])
    assert share[0] == 0
    assert (share - wanted).abs().max() < 0.1
    assert [len(layer._forward_hooks) for layer in layers_of(ee)] == hooks


def test_models_that_it_cannot_train() -> None:
    ee = rewritten(tiny("llama", layers=2), exits=(1,))

    class Layered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adept: Any = None

    other = Layered()
    for container, decoder in (("", nn.Module()), ("layers", nn.Module())):
        handle = type("Handle", (), {"container": container, "decoder": decoder, "num_layers": 2})
        decoder.layers = nn.ModuleDict()
        other.adept = handle
        with pytest.raises(ConfigError, match="not the members of one list"):
            layers_of(other)
    from peft import LoraConfig, get_peft_model

    get_peft_model(ee, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="has adapters of PEFT in its layers"):
        adept_fx.fit(ee, texts(4, 0), _lora())
