"""Exits are attached to the base that they were made for, and to no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import adept_fx
from adept_fx.errors import CheckpointError, UnsupportedModelError
from adept_fx.sharing.base import Base
from classify import classifier
from models import tiny
from shared_exits import LAYERS, made, said

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    _, ee = made()
    ee.name_or_path = "some-one/the-base"
    ee.adept.calibration = {"decode": {"agreement": 0.97}}
    folder = tmp_path_factory.mktemp("exits")
    adept_fx.save(ee, folder)
    return folder


def twin(**overrides: Any) -> Any:
    return tiny("llama", layers=LAYERS, **overrides)


def finetuned(size: float) -> Any:
    model = twin()
    weight = model.get_parameter(WEIGHT)
    weight.data += size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    return model


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "values": (lambda: twin(seed=1), r"lm_head\.weight has other values"),
    "one parameter": (lambda: finetuned(0.1), r"layers\.1\.mlp\.up_proj\.weight has other values"),
    "a light finetune": (lambda: finetuned(1e-5), r"up_proj\.weight has other values"),
    "bf16 finetune": (lambda: finetuned(0.1).to(torch.bfloat16), r"up_proj\.weight has other"),
    "shape": (
        lambda: twin(intermediate_size=64),
        r"down_proj\.weight is \[32, 64\], not \[32, 48\]",
    ),
    "layers": (lambda: tiny("llama", layers=4), "has layers 4, not 3"),
    "width": (lambda: twin(hidden_size=64), "has hidden size 64, not 32"),
    "vocabulary": (lambda: twin(vocab_size=130), "its vocabulary is 130, not 128"),
    "type": (lambda: tiny("qwen2", layers=LAYERS), "its class is Qwen2ForCausalLM, not Llama"),
    "head": (lambda: _classifier_of_three(), "its class is LlamaForSequence"),
    "tied": (lambda: twin(tie_word_embeddings=True), "it has no parameter lm_head"),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_base_is_refused_by_name(name: str, saved: Path) -> None:
    make, word = WRONG[name]
    with pytest.raises(CheckpointError, match=word) as caught:
        adept_fx.load(make(), saved)
    assert "were made for some-one/the-base" in caught.value.message
    assert "some-one/the-base" in str(caught.value.hint)


def _classifier_of_three() -> Any:
    model = classifier("llama")
    model.model.layers = model.model.layers[:3]
    model.config.num_hidden_layers = 3
    return model


def test_a_refused_model_is_as_it_was(saved: Path) -> None:
    model = twin(seed=1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = set(vars(model))
    with pytest.raises(CheckpointError):
        adept_fx.load(model, saved)
    assert set(vars(model)) == attributes
    assert not hasattr(model, "adept")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_not_strict_warns_and_leaves_the_promise_out(saved: Path) -> None:
    with pytest.warns(UserWarning, match="up_proj.weight has other values.*does not hold"):
        ee = adept_fx.load(finetuned(0.1), saved, strict_base=False)
    assert ee.adept.calibration is None
    assert ee.adept.thresholds == (0.5, 0.5)
    for model in (tiny("llama", layers=4), twin(hidden_size=64)):
        with pytest.raises(CheckpointError, match=r"has layers 4|hidden size 64"):
            adept_fx.load(model, saved, strict_base=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_the_same_base(dtype: torch.dtype, saved: Path) -> None:
    low = twin().to(dtype)
    assert _difference(made()[0], low) == ""
    assert _difference(low, twin()) == ""
    assert _difference(low, twin().to(dtype).float()) == ""
    other = twin(seed=1)
    assert "other values" in _difference(other, low)
    assert "other values" in _difference(low, other)


def _difference(one: Any, other: Any) -> str:
    return Base.of(one, one.model).difference(other, other.model)


def test_a_bf16_base_takes_exits_made_over_fp32(saved: Path) -> None:
    ee = adept_fx.load(tiny("llama", torch.bfloat16, layers=LAYERS), saved)
    assert ee.adept.gates[0].weight.dtype == torch.float32
    assert said(ee)[1].unique().numel() > 1


def test_adapters_on_top_are_not_looked_at(saved: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2)
    model = peft.get_peft_model(twin(), config).get_base_model()
    assert any("base_layer" in name for name, _ in model.named_parameters())
    ee = adept_fx.load(model, saved)
    assert torch.equal(said(ee)[0], said(made()[1])[0])  # new adapters change nothing
    assert "it has no parameter" in _difference(model, twin())  # exits made over adapters
    assert _difference(model, model) == ""
    merged = peft.get_peft_model(twin(), config)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    with pytest.raises(CheckpointError, match="other values"):
        adept_fx.load(merged.merge_and_unload(), saved)


def test_quantized_parameters_are_skipped_and_the_others_compared(saved: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = twin()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert _difference(made()[0], model) == ""
    assert _difference(model, twin()) == ""
    model.model.norm.weight.data += 1
    assert "model.norm.weight has other values" in _difference(made()[0], model)


def test_where_nothing_can_be_compared_that_is_said(saved: Path) -> None:
    class Packed(nn.Parameter):
        pass

    model = twin()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = Packed(parameter.data) if parameter is not None else None
    with pytest.raises(CheckpointError, match="none of its parameters can be compared"):
        adept_fx.load(model, saved)


def test_what_is_rewritten_already_is_refused(saved: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="already"):
        adept_fx.load(made()[1], saved)


def test_many_parameters_make_no_large_file() -> None:
    many = nn.Module()
    many.weights = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(2000)])
    many.config = twin().config
    base = Base.of(many, many)
    assert len(base.parameters) == 512
    assert base.difference(many, many) == ""
