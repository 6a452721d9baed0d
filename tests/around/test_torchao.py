"""torchao: weights quantized before the transform, or after it.

What can be compared. A kernel for int8 weights alone computes in the model's own dtype, so that
dtype's rule holds. Activations quantized on the fly are rounded per token to 1/127 of the token's
largest value: packing tokens changes nothing by itself (`test_packing_changes_no_product`), but the
last bits that earlier layers' sums may differ in can push a value over the edge of a step, and then
the result moves by a step's worth. No rounding rule of the dtype can hold for that. What holds
honestly: the dense plan, which runs products of the same shapes, is the oracle on the quantized
original bit for bit; and a plan that packs is no further from the model without rounded activations
than twice what the quantized original is, the rule by which lower precisions are compared.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import adept_fx
from adept_fx.errors import StaleGraphError, UnsupportedModelError
from dialogue import assert_trace_equal, play_oracle, script
from models import tiny
from oracle import assert_same
from parity import PADDED, exiting, prepared, some_left
from product import play_product
from wrapped import CASE, EXITS, LAYERS, check_exits, check_never, transformed

quantization = pytest.importorskip("torchao.quantization")
INT8 = "Int8WeightOnlyConfig"
DYNAMIC = "Int8DynamicActivationInt8WeightConfig"


def config(name: str) -> Any:
    if name == "int4":  # four bits, unpacked: the kernels for packed ones need CUDA
        group = quantization.PerGroup(32)
        kind: Any = torch.int4  # type: ignore[attr-defined]
        return quantization.IntxWeightOnlyConfig(weight_dtype=kind, granularity=group)
    return getattr(quantization, name)()


def quantized(name: str, model_type: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    # Groups of 32 weights must divide each row.
    model = tiny(model_type, dtype, LAYERS, intermediate_size=64)
    quantization.quantize_(model, config(name))
    return model


def unrounded(model: Any) -> Any:
    """The quantized weights as numbers, in float32; no activation is rounded."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        for name, weight in module._parameters.items():
            if weight is not None and type(weight) is not nn.Parameter:
                module._parameters[name] = nn.Parameter(weight.dequantize(), requires_grad=False)
    return plain.float()


# Fused projections too, stored as a block and head by head.
CASES = [
    (INT8, "llama", torch.float32),
    (INT8, "phi3", torch.bfloat16),
    (DYNAMIC, "llama", torch.float32),
    (DYNAMIC, "gpt_neox", torch.bfloat16),
    ("int4", "llama", torch.float32),
]


@pytest.mark.parametrize(("name", "model_type", "dtype"), CASES)
def test_quantized_before(name: str, model_type: str, dtype: torch.dtype) -> None:
    model = quantized(name, model_type, dtype)
    ee = transformed(model)
    check_never(model, ee, name)
    rounds = name == DYNAMIC or dtype != torch.float32
    check_exits(model, ee, name, truth=unrounded(model) if rounds else None)
    if name == DYNAMIC:
        said = script(CASE, len(EXITS))
        got, want = play_product(ee, said, "dense"), play_oracle(model, EXITS, said)
        assert_trace_equal(got, want, said, f"{name} dense", bitwise=True)
    check_generate(model, ee)
    kind = "IntxUnpackedToInt8Tensor" if name == "int4" else "Int8Tensor"
    assert {item.form for item in ee.adept.kv_projections} == {"plain"}
    assert f"{kind} can be neither cut nor merged" in repr(ee.adept)
    assert ("columns computed" in repr(ee.adept)) == (model_type != "llama")


def check_generate(model: Any, ee: Any) -> None:
    options = {"max_new_tokens": 5, "do_sample": False}
    found = prepared(ee, "dense").generate(**PADDED, **options)
    some_left(ee)
    with exiting(model, EXITS):
        assert torch.equal(found, model.generate(**PADDED, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_changes_no_product(dtype: torch.dtype) -> None:
    """Each token has its own scale, and products of integers are exact."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 48).to(dtype)
    quantization.quantize_(layer, config(DYNAMIC))
    states = torch.randn(3, 7, 32).to(dtype) * torch.logspace(-2, 2, 7)[:, None].to(dtype)
    index = torch.tensor([0, 5, 9, 13, 20])
    packed = layer(states.view(1, 21, 32)[:, index])
    assert_same(packed[0], layer(states).view(21, 48)[index], "packed")


def test_quantized_after_the_transform() -> None:
    model = tiny("llama", layers=LAYERS, intermediate_size=64)
    ee = transformed(model)
    assert {item.form for item in ee.adept.kv_projections} == {"merged"}
    quantization.quantize_(model, config(DYNAMIC))
    check_never(model, ee, "after")
    assert {item.form for item in ee.adept.kv_projections} == {"plain"}
    back = adept_fx.restore(ee)
    assert isinstance(back.lm_head.weight, quantization.Int8Tensor)


def test_a_compiled_model_refuses_to_be_quantized() -> None:
    model = tiny("llama", layers=LAYERS, intermediate_size=64)
    ee = prepared(transformed(model), "auto")
    ee.adept.compile(backend="eager")
    assert {item.form for item in ee.adept.kv_projections} == {"stacked"}
    quantization.quantize_(model, config(INT8))
    with pytest.raises(StaleGraphError, match=r"changed .* after adept\.compile"):
        ee(**PADDED)


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")
def test_adapters_on_quantized_weights() -> None:
    peft = pytest.importorskip("peft")
    model = quantized(INT8)
    lora = {"r": 4, "init_lora_weights": False, "target_modules": ["k_proj", "v_proj"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = peft.get_peft_model(model, peft.LoraConfig(**lora)).eval().get_base_model()
    ee = transformed(model)
    check_never(model, ee, "adapters on int8")
    check_exits(model, ee, "adapters on int8")
    forms = {item.weight.split(".")[4]: item.form for item in ee.adept.kv_projections}
    assert forms == {"base_layer": "plain", "lora_A": "merged", "lora_B": "merged"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torchao has no int4 kernel for CPUs")
def test_packed_int4() -> None:
    """The kernels for packed four-bit weights need CUDA, and groups of at least 32."""
    name = {"int4_packing_format": "tile_packed_to_4d", "group_size": 32}
    model: Any = tiny("llama", torch.bfloat16, LAYERS, hidden_size=256, intermediate_size=256)
    quantization.quantize_(model.to("cuda"), quantization.Int4WeightOnlyConfig(**name))
    ee = prepared(transformed(model), "dense", threshold=1.0)
    inputs = {key: value.to("cuda") for key, value in PADDED.items()}
    with torch.no_grad():
        got, want = ee(**inputs).logits, model(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert_same(got[real], want[real], "int4")
    assert {item.form for item in ee.adept.kv_projections} == {"plain"}


def test_other_uses_of_a_quantized_weight_are_refused() -> None:
    """GPT-2's layers are no linear ones: their weights are transposed."""
    model: Any = tiny("gpt2", layers=LAYERS)
    for layer in model.transformer.h:
        plain = layer.attn.c_attn.weight.detach()
        weight = quantization.Int8Tensor.from_hp(plain, quantization.PerRow())
        layer.attn.c_attn.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"addmm.*c_attn.*of class Int8Tensor"):
        transformed(model)
