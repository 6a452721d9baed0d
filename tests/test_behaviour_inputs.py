"""All the ways to call a decoder: embeddings, defaults, masks of every form, packed positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

import adept_fx
from adept_fx import ExitConfig
from models import tiny, tiny_config
from oracle import Oracle, assert_cache_equal, assert_close, assert_same, depths
from product import EXITS, LAYERS, PLANS, raw, rewritten, set_up

IDS = torch.arange(1, 28).view(3, 9)
LEFT = torch.ones(3, 9, dtype=torch.bool)
LEFT[1, :4] = LEFT[2, :1] = False
RIGHT = LEFT.flip(1)
WANTS = torch.rand(2, 3, 9, generator=torch.Generator().manual_seed(3)) > 0.6
STAY = [torch.zeros(2, 3, 9)]


def positions_of(real: Tensor) -> Tensor:
    return (real.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "bloom"])
def test_what_is_left_out_has_the_originals_defaults(model_type: str) -> None:
    model, ee = raw(model_type), rewritten(model_type)
    set_up(ee, [*STAY * 3, STAY[0][..., :1]], "dense", threshold=1.0)
    want, got = model(IDS), ee(IDS)
    assert_same(got.logits, want.logits, f"{model_type} ids alone")
    assert type(got) is type(want)
    assert type(got.past_key_values) is type(want.past_key_values) is DynamicCache
    step = {"input_ids": IDS[:, :1]}
    want = model(**step, past_key_values=want.past_key_values)
    turn, got = got, ee(IDS, use_cache=False, return_dict=False)
    assert isinstance(got, tuple)
    assert len(got) == len(model(IDS, use_cache=False, return_dict=False)) == 1
    got = ee(IDS, attention_mask=LEFT.long())
    padded = model(IDS, attention_mask=LEFT.long())
    assert_same(got.logits[LEFT], padded.logits[LEFT], f"{model_type} no positions")
    got = ee(**step, past_key_values=turn.past_key_values)
    assert_same(got.logits, want.logits, f"{model_type} second turn")


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_embeddings_are_as_good_as_ids(model_type: str) -> None:
    model, ee = raw(model_type), rewritten(model_type)
    embeds = model.get_input_embeddings()(IDS)
    given = {"attention_mask": LEFT.long(), "position_ids": positions_of(LEFT)}
    for plan in PLANS:
        set_up(ee, [WANTS.float()] * 2, plan)
        want = ee(IDS, **given).logits
        got = ee(inputs_embeds=embeds, **given).logits
        assert_same(got[LEFT], want[LEFT], f"{model_type} {plan}")
    set_up(ee, STAY, "dense")
    want = model(inputs_embeds=embeds, **given).logits
    assert_same(ee(inputs_embeds=embeds, **given).logits[LEFT], want[LEFT], model_type)


def built_masks(model: Any, real: Tensor) -> Any:
    """What transformers makes of a 2-D mask: what `generate` passes with a static cache."""
    keywords = {
        "config": model.config,
        "inputs_embeds": model.get_input_embeddings()(IDS),
        "attention_mask": real.long(),
        "past_key_values": None,
        "position_ids": positions_of(real),
    }
    full = create_causal_mask(**keywords)
    if model.config.model_type == "llama":
        return full
    sliding = create_sliding_window_causal_mask(**keywords)
    return {"full_attention": full, "sliding_attention": sliding}


def additive(mask: Any) -> Any:
    if isinstance(mask, dict):
        return {key: additive(value) for key, value in mask.items()}
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@torch.no_grad()
@pytest.mark.parametrize("form", ["bool", "additive"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_four_dimensional_masks(model_type: str, side: str, form: str) -> None:
    """Padding is read off the diagonal."""
    model, ee, real = raw(model_type), rewritten(model_type), LEFT if side == "left" else RIGHT
    mask = built_masks(model, real)
    mask = mask if form == "bool" else additive(mask)
    given = {"attention_mask": mask, "position_ids": positions_of(real)}
    wants = WANTS & real
    for exits in (wants, torch.zeros_like(wants)):
        with Oracle(model, EXITS).exits_for(exits, real):
            want = model(IDS, **given)
        for plan in PLANS:
            set_up(ee, [exits.float()], plan)
            ee.adept.stats.reset()
            got, what = ee(IDS, **given), f"{model_type} {plan}"
            assert_close(got.logits[real], want.logits[real], what)
            assert torch.equal(ee.adept.last_depth, depths(exits, EXITS, LAYERS, real)), what
            assert ee.adept.stats.seen["prefill"][0] == int(real.sum()), what
            assert_cache_equal(got.past_key_values, want.past_key_values, real, what)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_packed_sequences(model_type: str) -> None:
    """Texts side by side in one row, told apart by their positions: how trainers call a model."""
    model, ee = raw(model_type), rewritten(model_type)
    lengths = (4, 3, 2)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ids, exits = IDS[:1], WANTS[:, :1]
    real = torch.ones(1, 9, dtype=torch.bool)
    given = {"position_ids": positions, "use_cache": False}
    plain = model(ids, **given).logits
    alone = [model(part).logits for part in ids.split(lengths, dim=1)]
    assert_close(plain, torch.cat(alone, dim=1), "the original itself")
    set_up(ee, [STAY[0][:, :1]], "dense")
    assert_same(ee(ids, **given).logits, plain, f"{model_type} packed, none leaves")
    with Oracle(model, EXITS).exits_for(exits, real):
        want = model(ids, **given).logits
    for plan in PLANS:
        set_up(ee, [exits.float()], plan)
        assert_close(ee(ids, **given).logits, want, f"{model_type} packed {plan}")


@torch.no_grad()
@pytest.mark.parametrize("gate", ["linear", "max_prob"])
def test_sequence_classifiers(gate: str) -> None:
    """One row of a batch emits what its last token does; a gate scores every token."""
    config = tiny_config("llama", layers=2, num_labels=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config).eval()
    ee = adept_fx.transform(model, ExitConfig(exits=(1,), gate=gate))
    ee.adept.plan = "dense"
    given = {"attention_mask": LEFT.long(), "position_ids": positions_of(LEFT)}
    assert type(ee) is type(model)
    assert_same(ee(IDS, **given).logits, model(IDS, **given).logits, f"classifier, {gate}")
    assert ee.adept.stats.seen["prefill"] == [int(LEFT.sum())]


@torch.no_grad()
def test_bare_decoders() -> None:
    decoder = tiny("llama", layers=2).model
    bare = adept_fx.transform(decoder, ExitConfig(exits=(1,), gate="cosine"))
    bare.adept.plan = "dense"
    assert type(bare) is type(decoder)
    assert bare.adept.decoder is bare
    given = {"attention_mask": LEFT.long(), "position_ids": positions_of(LEFT)}
    got, want = bare(IDS, **given), decoder(IDS, **given)
    assert type(got) is type(want)
    assert_same(got.last_hidden_state[LEFT], want.last_hidden_state[LEFT], "bare")
    assert bare.state_dict().keys() == decoder.state_dict().keys()
    assert_same(adept_fx.restore(bare)(IDS, **given)[0], want[0], "bare restored")
