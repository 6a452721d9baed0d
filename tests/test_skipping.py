"""Skipped layers are really not computed: counted at the products with their weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from counting import Products, counted
from oracle import depths
from product import EXITS, LAYERS, raw, rewritten, set_up

REAL = torch.ones(4, 24, dtype=torch.bool)
REAL[1, :20] = REAL[2, :9] = REAL[3, 15:] = False
TOKENS = int(REAL.sum())
WANTS = torch.rand(2, 4, 24, generator=torch.Generator().manual_seed(1)) > 0.5
IDS = torch.arange(1, 97).view(4, 24)


@dataclass(frozen=True)
class Family:
    """Where a family keeps its projections; `fused` holds `columns` of queries before keys."""

    mlp: tuple[str, ...]
    out: str
    query: str = ""
    keys: tuple[str, ...] = ()
    fused: str = ""


FAMILIES: dict[str, Family] = {
    "llama": Family(
        mlp=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        out="self_attn.o_proj",
        query="self_attn.q_proj",
        keys=("self_attn.k_proj", "self_attn.v_proj"),
    ),
    "opt": Family(
        mlp=("fc1", "fc2"),
        out="self_attn.out_proj",
        query="self_attn.q_proj",
        keys=("self_attn.k_proj", "self_attn.v_proj"),
    ),
    "phi3": Family(("mlp.gate_up_proj", "mlp.down_proj"), "o_proj", fused="self_attn.qkv_proj"),
    "gpt_neox": Family(
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        "attention.dense",
        fused="attention.query_key_value",
    ),
    "bloom": Family(
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        "self_attention.dense",
        fused="self_attention.query_key_value",
    ),
    "gpt2": Family(("mlp.c_fc", "mlp.c_proj"), "attn.c_proj", fused="attn.c_attn"),
}
WIDTH = 32  # of the hidden state, and so of the queries
every_family = pytest.mark.parametrize("model_type", FAMILIES)


def shared(model_type: str, wants: list[Tensor], plan: str, dtype: str = "fp32") -> tuple[Any, Any]:
    """The original and the rewritten model, whose next calls are to leave like that."""
    ee = rewritten(model_type, dtype)
    set_up(ee, [item.float() for item in wants], plan)
    return raw(model_type, dtype), ee


def by_layer(products: Products, part: str) -> list[int]:
    """Numbers computed with the weights of that name, layer by layer."""
    found = [0] * LAYERS
    for name in products.columns:
        pieces = name.split(".")
        if f".{part}.weight" in name:
            found[next(int(piece) for piece in pieces if piece.isdigit())] += products.outputs[name]
    return found


def wide(products: Products, part: str) -> int:
    """Columns of a weight of that name."""
    return next(n for name, n in products.columns.items() if f".{part}.weight" in name)


def check(model_type: str, products: Products, live: list[int], cached: list[int]) -> None:
    """`live[l]` tokens run layer `l`; `cached[l]` more have their keys and values computed."""
    family = FAMILIES[model_type]
    for part in (*family.mlp, family.out, *([family.query] if family.query else [])):
        want = [count * wide(products, part) for count in live]
        assert by_layer(products, part) == want, f"{model_type} {part}"
    for part in family.keys:
        size = wide(products, part)
        want = [(run + more) * size for run, more in zip(live, cached, strict=True)]
        assert by_layer(products, part) == want, f"{model_type} {part}"
    if family.fused:
        size = wide(products, family.fused)
        want = [run * size + more * (size - WIDTH) for run, more in zip(live, cached, strict=True)]
        assert by_layer(products, family.fused) == want, f"{model_type} {family.fused}"


def prompt(model_type: str, real: Tensor | None = REAL) -> dict[str, Any]:
    if real is None:
        return {"input_ids": IDS}
    given = {"input_ids": IDS, "attention_mask": real.long()}
    if model_type != "bloom":
        given["position_ids"] = (real.cumsum(-1) - 1).clamp(min=0)
    return given


@every_family
def test_the_counter_sees_every_product(model_type: str) -> None:
    """Of the original, and of the rewritten graph where it skips nothing."""
    model, ee = shared(model_type, [WANTS] * 2, "dense")
    given = prompt(model_type)
    for each in (model, ee):
        products = counted(model, partial(each, **given))
        check(model_type, products, [IDS.numel()] * LAYERS, [0] * LAYERS)
        assert products.attentions in (0, LAYERS)  # bloom writes its own
    with ee.adept.disabled():
        products = counted(model, lambda: ee(**given))
    check(model_type, products, [IDS.numel()] * LAYERS, [0] * LAYERS)


@every_family
def test_compacted_tokens_are_not_computed(model_type: str) -> None:
    """Of a ragged batch: neither are those that left, nor, from the first exit on, the pads."""
    model, ee = shared(model_type, [WANTS], "compact")
    products = counted(model, lambda: ee(**prompt(model_type)))
    depth = depths(WANTS & REAL, EXITS, LAYERS, REAL)
    live = [IDS.numel()] + [int((depth > layer).sum()) for layer in range(1, LAYERS)]
    assert TOKENS > live[1] > live[3] > 0
    check(model_type, products, live, [0] + [TOKENS - count for count in live[1:]])


@every_family
def test_padding_costs_nothing_after_the_first_exit(model_type: str) -> None:
    """Even if no token leaves."""
    model, ee = shared(model_type, [torch.zeros_like(WANTS)], "compact")
    products = counted(model, lambda: ee(**prompt(model_type)))
    check(model_type, products, [IDS.numel()] + [TOKENS] * 3, [0] * LAYERS)


@every_family
@pytest.mark.parametrize("plan", ["auto", "compact"])
def test_skipped_stages_are_not_computed(model_type: str, plan: str) -> None:
    """All out at the first exit, in prefill and in decode: only keys and values remain."""
    everyone = torch.zeros_like(WANTS)
    everyone[0] = True
    model, ee = shared(model_type, [everyone, everyone[..., :1]], plan)
    held: list[Any] = []
    products = counted(model, lambda: held.append(ee(**prompt(model_type))))
    check(model_type, products, [IDS.numel(), 0, 0, 0], [0] + [TOKENS] * 3)
    assert products.attentions in (0, 1)
    step = {"input_ids": IDS[:, :1], "past_key_values": held[0].past_key_values}
    seen = torch.cat([REAL, torch.ones(4, 1, dtype=torch.bool)], dim=1)
    step["attention_mask"] = seen.long()
    if model_type != "bloom":
        step["position_ids"] = REAL.sum(-1, keepdim=True)
    products = counted(model, lambda: ee(**step))
    check(model_type, products, [4, 0, 0, 0], [0, 4, 4, 4])
    assert products.attentions in (0, 1)
    assert len({layer.get_seq_length() for layer in held[0].past_key_values.layers}) == 1


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_second_stage_is_skipped_alone(model_type: str) -> None:
    """All gone between the two exits: the first stage runs, the last does not."""
    wants = torch.stack([WANTS[0], torch.ones_like(WANTS[0])])
    model, ee = shared(model_type, [wants], "auto")
    products = counted(model, lambda: ee(**prompt(model_type)))
    found = by_layer(products, FAMILIES[model_type].mlp[0])
    assert found[1] > 0
    assert found[3] == 0


def test_rows_of_a_decode_batch_are_compacted() -> None:
    """Half of the rows leave: the others alone go on, with a mask of their own."""
    leave = torch.tensor([True, False, False, True])[:, None]
    model, ee = shared("llama", [torch.zeros_like(WANTS), torch.stack([leave, ~leave])], "compact")
    with torch.no_grad():
        cache = ee(**prompt("llama", None)).past_key_values
    products = counted(model, lambda: ee(IDS[:, :1], past_key_values=cache))
    check("llama", products, [4, 2, 2, 0], [0, 2, 2, 4])


def test_no_query_is_computed_in_bf16() -> None:
    """Where another product cuts the query columns out."""
    model, ee = shared("gpt_neox", [torch.ones_like(WANTS)], "auto", "bf16")
    products = counted(model, lambda: ee(**prompt("gpt_neox")))
    check("gpt_neox", products, [IDS.numel(), 0, 0, 0], [0] + [TOKENS] * 3)


def test_auto_packs_a_long_prompt_of_which_most_leaves() -> None:
    wants = torch.zeros_like(WANTS)
    wants[0, :, 4:] = True
    model, ee = shared("llama", [wants], "auto")
    products = counted(model, lambda: ee(**prompt("llama", None)))
    check("llama", products, [96, 16, 16, 16], [0, 80, 80, 80])
