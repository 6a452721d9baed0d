"""PEFT: adapters in place or merged, put in before or after the transform, switched and trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from torch import Tensor

import adept_fx
from adept_fx.errors import StaleGraphError, UnsupportedModelError
from models import tiny
from oracle import assert_close, assert_same, exact
from parity import PADDED, exiting, prepared, some_left
from wrapped import EXITS, LAYERS, check_exits, check_never, transformed

QKV = ["q_proj", "k_proj", "v_proj"]


def llama(dtype: torch.dtype = torch.float32) -> Any:
    return tiny("llama", dtype, LAYERS)


def config(targets: Any = QKV, **options: Any) -> LoraConfig:
    """Adapters that do something from the start, as trained ones do."""
    fields = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "init_lora_weights": False}
    return LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **(fields | options))


def with_adapters(model: Any, **options: Any) -> Any:
    """A `PeftModel`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return get_peft_model(model, config(**options)).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of the form of call that `generate` makes, at real tokens."""
    real = PADDED["attention_mask"].bool()
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    found: Tensor = model(**PADDED, position_ids=positions).logits
    return found[real]


FUSED: dict[str, dict[str, Any]] = {
    "phi3": {"targets": ["qkv_proj"]},
    "gpt2": {"targets": ["c_attn"], "fan_in_fan_out": True},  # transposed
}


@pytest.mark.parametrize("model_type", FUSED)
def test_adapters_in_place_on_fused_projections(model_type: str) -> None:
    plain = tiny(model_type, layers=LAYERS)
    before = logits(plain)
    model = with_adapters(plain, **FUSED[model_type]).get_base_model()
    assert not torch.equal(logits(model), before)
    ee = transformed(model)
    check_never(model, ee, model_type)
    check_exits(model, ee, model_type)
    # All of a fused projection's columns are computed, and the handle says so.
    assert "columns computed" in repr(ee.adept)


def test_adapters_in_place_of_another_dtype() -> None:
    """PEFT keeps adapters in float32, and casts on the way in and out; DoRA also reads weights."""
    model = llama(torch.bfloat16)
    model = with_adapters(model, targets="all-linear", use_dora=True).get_base_model()
    assert model.model.layers[0].self_attn.k_proj.lora_A["default"].weight.dtype == torch.float32
    ee = transformed(model)
    check_never(model, ee, "bf16")
    check_exits(model, ee, "bf16", truth=exact(model))


def test_merged_adapters() -> None:
    model = with_adapters(llama()).merge_and_unload()
    assert type(model) is type(llama())
    ee = transformed(model)
    check_never(model, ee, "merged")
    check_exits(model, ee, "merged", plans=["compact"])
    assert [item.form for item in ee.adept.kv_projections] == ["merged", "merged"]


@contextmanager
def rescaled(peft: PeftModel) -> Iterator[None]:
    with rescale_adapter_scale(peft, 3.0):
        yield


@contextmanager
def other(peft: PeftModel) -> Iterator[None]:
    peft.set_adapter("other")
    yield
    peft.set_adapter("default")


SWITCHES: dict[str, Callable[[PeftModel], AbstractContextManager[None]]] = {
    "disabled": lambda peft: peft.disable_adapter(),
    "rescaled": rescaled,
    "other": other,
}


def test_adapters_after_the_transform_are_followed() -> None:
    """They go into the layers, which the rewritten model shares."""
    model = llama()
    ee = transformed(model)
    peft = with_adapters(model)
    peft.add_adapter("other", config(["v_proj"]))
    peft.eval()
    check_never(model, ee, "injected")
    check_exits(model, ee, "injected", plans=["compact"])
    graph = ee.adept.graph
    ee.adept.plan = "dense"
    with ee.adept.disabled():
        before = logits(ee)
        for name, switch in SWITCHES.items():
            with switch(peft):
                assert_same(logits(ee), logits(model), name)
                assert not torch.equal(logits(ee), before), name
            assert_same(logits(ee), logits(model), f"{name} and back")
            assert ee.adept.graph is graph, f"{name}: what is known was captured again"


def test_a_compiled_model_refuses_new_adapters() -> None:
    model = llama()
    ee = transformed(model)
    ee.adept.compile(backend="eager")
    with_adapters(model)
    with pytest.raises(StaleGraphError, match=r"changed .* after adept\.compile"):
        logits(ee)


def test_peft_around_the_rewritten_model() -> None:
    model = llama()
    ee = prepared(transformed(model), "auto")
    peft = with_adapters(ee)
    assert peft.get_base_model() is ee
    options = {"max_new_tokens": 6, "do_sample": False}
    found = peft.generate(**PADDED, **options)
    some_left(peft)  # whose attributes are the rewritten model's
    assert torch.equal(found, ee.generate(**PADDED, **options))
    with exiting(model, EXITS):
        assert torch.equal(found, model.generate(**PADDED, **options))
    names = get_peft_model_state_dict(peft)
    assert len(names) == 2 * len(QKV) * LAYERS
    assert not any("adept" in name for name in names)
    assert peft.unload() is ee


def test_a_peft_model_itself_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"(?s)PeftModel.*get_base_model\(\)"):
        adept_fx.transform(with_adapters(llama()))


def gradients(model: Any) -> dict[str, Tensor]:
    """Of the loss at real tokens; dropout draws the same each time."""
    model.zero_grad()
    labels = PADDED["input_ids"].masked_fill(PADDED["attention_mask"] == 0, -100)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model(**PADDED, labels=labels).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_adapters_train() -> None:
    model = with_adapters(llama()).get_base_model().train()
    ee = prepared(transformed(model), "auto", threshold=1.0)
    wanted = gradients(model)
    assert len(wanted) == 2 * len(QKV) * LAYERS
    assert all("lora_" in name for name in wanted)
    found = gradients(ee)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_same(found[name], gradient, name)
    ee.adept.thresholds = 0.5
    with exiting(model, EXITS):
        wanted = gradients(model)
    found = gradients(ee)
    some_left(ee)
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, f"{name} with exits")
