"""Where the decoder of a model is found."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

import adept_fx
from adept_fx import ExitConfig
from adept_fx.check.tiny import tiny_config
from adept_fx.errors import UnsupportedModelError
from adept_fx.gates import FixedDepth
from adept_fx.inspect_model import find_decoder
from models import tiny

IDS = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
MASK = (IDS != 0).long()


@cache
def empty(model_type: str) -> Any:
    """A model without values: only what it consists of matters."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(model_type, 2))


FOUND = {
    "llama": "LlamaModel",
    "gpt2": "GPT2Model",
    "opt": "OPTDecoder",  # one module deeper than the base model
    "bart": "BartDecoder",  # of a wrapper
    "llama4": "Llama4TextModel",  # get_decoder() gives the model with its head
    "modernbert-decoder": "ModernBertDecoderModel",  # get_decoder() gives the head's last part
}


@pytest.mark.parametrize("model_type", FOUND)
def test_the_decoder_has_no_head(model_type: str) -> None:
    model = empty(model_type)
    decoder = find_decoder(model)
    assert type(decoder).__name__ == FOUND[model_type]
    assert decoder in set(model.modules())
    assert decoder.get_output_embeddings() is None
    assert decoder.get_input_embeddings() in set(decoder.modules())


def test_a_bare_decoder_is_found_itself() -> None:
    decoder = find_decoder(empty("llama"))
    assert find_decoder(decoder) is decoder


class Elsewhere(LlamaForCausalLM):
    """`get_decoder()` gives something that is none."""

    found: Any = None

    def get_decoder(self) -> Any:
        return self.found


@pytest.mark.parametrize("found", [None, nn.Linear(2, 2), "decoder"])
def test_what_get_decoder_gives_is_not_believed_blindly(found: Any) -> None:
    config: Any = tiny_config("llama", 2)
    model: Any = Elsewhere(config)
    model.found = found
    assert find_decoder(model) is model.model


def test_a_model_whose_base_has_a_head_as_well_is_entered_at_its_embedding() -> None:
    config: Any = tiny_config("llama", 2)
    model: Any = Elsewhere(config)
    model.found = model
    model.base_model_prefix = "nothing of that name"
    assert model.base_model is model
    assert isinstance(find_decoder(model), LlamaModel)


def test_a_model_without_any_is_refused() -> None:
    config: Any = tiny_config("llama", 2)
    model: Any = Elsewhere(config)
    model.base_model_prefix = "nothing of that name"
    model.model = nn.Module()
    model.get_input_embeddings = lambda: None
    with pytest.raises(UnsupportedModelError, match=r"Elsewhere has no decoder that get_decoder"):
        find_decoder(model)


@torch.no_grad()
def test_a_decoder_behind_a_misleading_head_is_rewritten() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("modernbert-decoder", 3)).eval()
    ee = adept_fx.transform(model, ExitConfig(exits=(1, 2), gate=FixedDepth(0), threshold=1.0))
    ee.adept.plan = "dense"
    given = {
        "input_ids": IDS,
        "attention_mask": MASK,
        "position_ids": (MASK.cumsum(-1) - 1).clamp(min=0),
    }
    real = MASK.bool()
    assert torch.equal(ee(**given).logits[real], model(**given).logits[real])
    ee.adept.thresholds = 0.5
    ee(**given)
    assert (ee.adept.last_depth == MASK).all()
    assert type(adept_fx.restore(ee)) is type(model)


def test_a_rewritten_model_keeps_its_decoder_in_place() -> None:
    model = tiny("llama", layers=2)
    ee = adept_fx.transform(model, ExitConfig(exits=(1,), gate="linear"))
    assert find_decoder(ee) is ee.model
    assert find_decoder(model) is model.model
