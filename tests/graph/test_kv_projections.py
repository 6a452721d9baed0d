"""What the handle tells of the projections behind keys and values of skipped layers."""

from __future__ import annotations

import pytest

from adept_fx.graph.kv_projections import KVProjection, without_numbers
from product import rewritten

QKV = "layers.*.attention.query_key_value.weight"


@pytest.mark.parametrize(
    ("model_type", "wanted"),
    [
        (
            "llama",
            [
                KVProjection("layers.*.self_attn.k_proj.weight", 3, "merged"),
                KVProjection("layers.*.self_attn.v_proj.weight", 3, "merged"),
            ],
        ),
        ("phi3", [KVProjection("layers.*.self_attn.qkv_proj.weight", 3, "cut")]),
        ("gpt2", [KVProjection("h.*.attn.c_attn.weight", 3, "cut")]),
        ("gpt_neox", [KVProjection(QKV, 3, "cut")]),
    ],
)
def test_forms(model_type: str, wanted: list[KVProjection]) -> None:
    ee = rewritten(model_type)
    assert list(ee.adept.kv_projections) == wanted
    assert all(item.weight in repr(ee.adept) for item in wanted)


def test_a_layer_alone() -> None:
    found = rewritten("llama", exits=(3,)).adept.kv_projections
    assert {(item.layers, item.form, item.note) for item in found} == {(1, "plain", "")}


def test_names() -> None:
    assert without_numbers("layers.12.lora_A.k2.weight") == "layers.*.lora_A.k2.weight"
