"""One device serves; several, or offloading, are refused with the reason, whenever they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import adept_fx
from adept_fx import ExitConfig
from adept_fx.errors import UnsupportedModelError
from models import tiny
from oracle import assert_same
from parity import FULL, GREEDY, Parity, exiting, prepared, says, some_left

CONFIG = ExitConfig(exits=(1,), gate=Parity(), threshold=0.5)
IDS = FULL["input_ids"]
POSITIONS = torch.arange(IDS.shape[1]).expand_as(IDS)
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, position_ids=POSITIONS).logits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny("llama", layers=2).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("device_map", ["cpu", dict.fromkeys(PARTS, "cpu")], ids=["cpu", "parts"])
def test_device_maps_with_one_device(checkpoint: Path, device_map: Any) -> None:
    pytest.importorskip("accelerate")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=device_map)
    ee = adept_fx.transform(model, CONFIG)
    assert_same(logits(prepared(ee, "dense", threshold=1.0)), logits(model), str(device_map))
    with exiting(model):
        want = says(model, FULL, GREEDY)
    assert torch.equal(says(prepared(ee, "compact"), FULL, GREEDY), want)
    some_left(ee)


def test_offloaded_models_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    """One layer on disk: what `device_map="auto"` does where memory is short."""
    pytest.importorskip("accelerate")
    places = {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, device_map=places, offload_folder=tmp_path
    )
    before = logits(model)
    with pytest.raises(UnsupportedModelError, match=r"(?s)accelerate hook.*without device_map"):
        adept_fx.transform(model, CONFIG)
    assert_same(logits(model), before, "the refused model")


def test_offloading_a_rewritten_model_is_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    ee = adept_fx.transform(tiny("llama", layers=2), CONFIG)
    logits(ee)
    accelerate.cpu_offload(ee, "cpu")
    with pytest.raises(UnsupportedModelError, match=r"(?s)accelerate hook.*without device_map"):
        logits(ee)


def test_a_layer_on_another_device_is_refused() -> None:
    """Without any hook, before and after the transform; "meta" stands for a second device."""
    model = tiny("llama", layers=2)
    ee = adept_fx.transform(model, CONFIG)
    before, layer = logits(ee), model.model.layers[1].mlp
    weights = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.to("meta")
    for act in (lambda: adept_fx.transform(model, CONFIG), lambda: logits(ee)):
        with pytest.raises(
            UnsupportedModelError, match=r"several devices.*layers\.1\.mlp.*on meta"
        ):
            act()
    layer.load_state_dict(weights, assign=True)
    assert_same(logits(ee), before, "on one device again")


def test_a_patched_forward_is_seen() -> None:
    """Of a module inside: what hooks of accelerate are made of."""
    model = tiny("llama", layers=2)
    ee = prepared(adept_fx.transform(model, CONFIG), "dense", threshold=1.0)
    before, mlp = logits(ee), model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: 2 * forward(hidden)  # type: ignore[method-assign]
    changed = logits(ee)
    assert not torch.equal(changed, before)
    assert_same(changed, logits(model), "patched")


def test_prepared_by_an_accelerator() -> None:
    """Which wraps the forward of the whole model, and no more: in autocast."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny("llama", layers=2)
    ee = prepared(adept_fx.transform(model, CONFIG), "dense", threshold=1.0)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    try:
        got = logits(accelerator.prepare(ee))
        plain = logits(accelerator.unwrap_model(ee, keep_fp32_wrapper=False))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(got, logits(model).float(), "mixed precision")
        assert_same(plain, logits(model), "unwrapped")
    finally:
        accelerator.free_memory()
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device")
def test_moving_to_an_accelerator() -> None:
    model: Any = tiny("llama", layers=2)
    ee = prepared(adept_fx.transform(model, CONFIG), "dense")
    want = says(ee, FULL, GREEDY)
    ee.to("cuda")
    prompt = {name: value.to("cuda") for name, value in FULL.items()}
    for plan in ("dense", "compact", "auto"):
        assert torch.equal(says(prepared(ee, plan), prompt, GREEDY).cpu(), want)
        some_left(ee)
    static = {**GREEDY, "cache_implementation": "static"}
    assert torch.equal(says(ee, prompt, static).cpu(), want), "compiled by generate itself"
    model.model.layers[1].to("cpu")
    with pytest.raises(UnsupportedModelError, match="several devices"):
        says(ee, prompt, GREEDY)
