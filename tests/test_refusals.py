"""What `transform` refuses: the right error, naming what is in the way, and nothing is touched."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama

import adept_fx
from adept_fx import AdeptError, ExitConfig
from adept_fx.errors import ConfigError, UnsupportedModelError
from adept_fx.gates import Linear
from intact import intact, refuses
from models import tiny


@cache
def llama() -> Any:
    return tiny("llama", layers=3)


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"exits": ()}, "exits"),
    ({"exits": (0, 1)}, "0"),
    ({"exits": (-1,)}, "-1"),
    ({"exits": (3,)}, "1..2"),
    ({"exits": (1, 7)}, "7"),
    ({"exits": "every:3"}, "1..2"),
    ({"exits": (2, 1)}, "increasing"),
    ({"exits": (1, 1)}, "increasing"),
    ({"gate": "nope"}, "gate 'nope'"),
    ({"gate": ("mlp", "nope")}, "gate 'nope'"),
    ({"gate": nn.Linear(32, 1)}, "gate"),
    ({"gate": ("mlp",)}, "gate"),
    ({"gate": Linear(16)}, "hidden size 16"),
    ({"kv": "copy"}, "kv policy 'copy'"),
    ({"threshold": 1.5}, "threshold"),
    ({"threshold": (0.5, -0.1)}, "threshold[1]"),
    ({"threshold": math.nan}, "threshold"),
    ({"threshold": (0.5, 0.5, 0.5)}, "3 in threshold"),
    ({"prefill_threshold": 2}, "prefill_threshold"),
    ({"prefill_threshold": (0.5,)}, "1 in prefill_threshold"),
]


@pytest.mark.parametrize(("values", "word"), BAD_CONFIGS, ids=[str(v) for v, _ in BAD_CONFIGS])
def test_a_config_that_does_not_fit(values: dict[str, Any], word: str) -> None:
    model = llama()

    def act() -> None:
        adept_fx.transform(model, ExitConfig(**{"exits": (1, 2), **values}))

    refuses(model, ConfigError, word, act=act)


def test_too_few_layers_for_the_default_config() -> None:
    refuses(llama(), ConfigError, "every:4", act=lambda: adept_fx.transform(llama()))


def test_a_module_that_is_no_transformers_model() -> None:
    refuses(nn.Linear(4, 4), UnsupportedModelError, "Linear", "not a transformers model")


BERT = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_tables_that_follow_the_call_are_refused(kind: str) -> None:
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
        rope |= {"original_max_position_embeddings": 32}
    refuses(tiny("llama", rope_parameters=rope), UnsupportedModelError, "rotary_emb", kind)


def test_an_encoder_has_no_decoder() -> None:
    model = AutoModel.from_config(AutoConfig.for_model("bert", **BERT, num_hidden_layers=2))
    refuses(model, UnsupportedModelError, "BertModel")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("t5", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}),
        ("bart", {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2}),
    ],
)
def test_encoder_decoders(name: str, fields: dict[str, Any]) -> None:
    config = AutoConfig.for_model(name, vocab_size=64, **fields)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    refuses(model, UnsupportedModelError, type(model).__name__, "encoder-decoder")


RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1},
}


@pytest.mark.parametrize("name", RECURRENT)
def test_decoders_of_recurrent_layers_alone(name: str) -> None:
    sizes = {"hidden_size": 32, "vocab_size": 64, "num_hidden_layers": 2}
    config = AutoConfig.for_model(name, **sizes, **RECURRENT[name])
    model = AutoModelForCausalLM.from_config(config)
    words = (type(model.base_model).__name__, "recurrent state", "past_key_values")
    refuses(model, UnsupportedModelError, *words)


class TwoStreams(LlamaModel):
    """Layers that read one stream and add to another: no single value lies between two."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(embeds.shape[1], device=embeds.device)[None]
        mask = modeling_llama.create_causal_mask(
            config=self.config,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        shared = {
            "attention_mask": mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "position_embeddings": self.rotary_emb(embeds, position_ids=position_ids),
        }
        one = two = embeds
        for layer in self.layers:
            one, two = two + layer(one, **shared), one
        return BaseModelOutputWithPast(self.norm(one + two), past_key_values)


def test_two_residual_streams_have_no_cut() -> None:
    model: Any = tiny("llama", layers=3)
    model.model = TwoStreams(model.config).eval()
    # What layer 1 adds to the embeddings is read as a value from before the layers.
    refuses(model, UnsupportedModelError, "layer 1 from layer 2", "candidates")


def test_rope_that_depends_on_the_values_of_positions() -> None:
    """Refused by name (design section 4), unless it works."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny("llama", layers=2, rope_parameters=rope, max_position_embeddings=8)
    with intact(model):
        try:
            ee = adept_fx.transform(model, ExitConfig(exits=(1,)))
        except AdeptError as error:
            assert "rotary" in str(error) or "rope" in str(error), error  # noqa: PT017
            return
        ids = torch.arange(1, 25)[None]
        torch.testing.assert_close(ee(ids).logits, model(ids).logits)
