"""`find_layers`: by dataflow, whatever modules are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from transformers import LlamaPreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from adept_fx.capture import capture
from adept_fx.errors import UnsupportedModelError
from adept_fx.graph import meta
from adept_fx.graph.base import Work
from adept_fx.graph.meta import PROLOGUE
from adept_fx.graph.runner import run_passes
from adept_fx.graph.symbols import ancestors, is_hidden
from adept_fx.passes.find_layers import FindLayers
from adept_fx.pipeline import PIPELINE
from models import tiny_config

from .check import (
    assert_caught,
    before,
    border,
    calls,
    check_pass,
    each_model,
    run_all,
    started,
    write,
)


class Renamed(LlamaPreTrainedModel):
    """A Llama decoder under other names; `skip` adds the state after one layer after another."""

    def __init__(self, config: Any, skip: tuple[int, int] | None = None) -> None:
        super().__init__(config)
        count, width = config.num_hidden_layers, config.hidden_size
        self.table = nn.Embedding(config.vocab_size, width)
        self.blocks_of_mine = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(count))
        self.at_the_end = LlamaRMSNorm(width)
        self.turns = LlamaRotaryEmbedding(config)
        self.skip = skip

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        hidden = self.table(input_ids)
        common: dict[str, Any] = {
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "position_embeddings": self.turns(hidden, position_ids),
        }
        common["attention_mask"] = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        states = [hidden]
        for at, block in enumerate(self.blocks_of_mine):
            hidden = block(hidden, **common)
            if self.skip is not None and self.skip[1] == at:
                hidden = hidden + states[self.skip[0]]
            states.append(hidden)
        return BaseModelOutputWithPast(self.at_the_end(hidden), past_key_values)


def _work(decoder: nn.Module) -> Work:
    work = started(capture(decoder, positions=True), (1, 2))
    run_all(work, until=FindLayers)
    return work


@each_model
def test_counts(kind: str, layers: int) -> None:
    counts = check_pass(FindLayers, before(FindLayers, kind, layers))
    assert counts["layers"] == layers
    assert counts["chain"] >= layers + 1


@each_model
def test_borders_separate_the_layers(kind: str, layers: int) -> None:
    work = before(FindLayers, kind, layers)
    run_passes(work, [FindLayers()])
    assert work.num_layers == layers
    borders = [border(work, layer) for layer in range(layers + 1)]
    assert all(is_hidden(node, work.symbols) for node in borders[1:])
    for layer in range(layers):
        behind = ancestors([borders[layer + 1]])
        assert borders[layer] in ancestors([write(work, layer)])
        assert write(work, layer) in behind
        own = {_layer_of(node) for node in behind - ancestors([borders[layer]])}
        assert own <= {layer, None}, f"parameters of {own} before border {layer + 1}"


def _layer_of(node: Node) -> int | None:
    parts = (meta.get(node).source or "").split(".")
    return next((int(part) for part in parts if part.isdigit()), None)


@each_model
def test_every_node_knows_its_layer(kind: str, layers: int) -> None:
    work = before(FindLayers, kind, layers)
    run_passes(work, [FindLayers()])
    for node in calls(work):
        used = {_layer_of(i) for i in node.all_input_nodes} - {None}
        assert meta.get(node).layer in {None, PROLOGUE, *range(layers + 1)}
        assert not used or meta.get(node).layer in {None, *used}, node.format_node()


def test_names_do_not_matter() -> None:
    decoder = Renamed(tiny_config("llama", 3)).eval()
    work = _work(decoder)
    assert check_pass(FindLayers, work)["layers"] == 3
    records = run_passes(work, [step() for step in PIPELINE[2:]])
    assert records[-1].counts["stages"] == 3


def test_a_stream_around_a_layer_is_refused_with_the_place() -> None:
    decoder = Renamed(tiny_config("llama", 3), skip=(1, 2)).eval()
    with pytest.raises(UnsupportedModelError, match="layer 1 from layer 2; candidates") as info:
        run_passes(_work(decoder), [FindLayers()])
    assert "none" not in str(info.value)


def test_layers_that_share_everything_are_refused() -> None:
    decoder = Renamed(tiny_config("llama", 2)).eval()
    first = dict(decoder.blocks_of_mine[0].named_parameters())
    for block in decoder.blocks_of_mine:
        for name, _ in list(block.named_parameters()):
            path, _, key = name.rpartition(".")
            setattr(block.get_submodule(path), key, first[name])
    with pytest.raises(UnsupportedModelError, match="tell the decoder's layers apart"):
        run_passes(_work(decoder), [FindLayers()])


def test_a_decoder_of_one_layer_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="two or more layers"):
        run_passes(_work(Renamed(tiny_config("llama", 1)).eval()), [FindLayers()])


def _no_border(work: Work) -> None:
    meta.update(border(work, 2), border=None)


def _swapped_borders(work: Work) -> None:
    first, second = border(work, 1), border(work, 2)
    meta.update(first, border=2)
    meta.update(second, border=1)


def _write_before(work: Work) -> None:
    meta.update(write(work, 1), layer=0)


def _write_behind(work: Work) -> None:
    meta.update(write(work, 1), layer=2)


def _write_outside(work: Work) -> None:
    meta.update(write(work, 1), layer=PROLOGUE)


def _border_within_attention(work: Work) -> None:
    meta.update(border(work, 1), border=None)
    query = next(n for n in calls(work) if n.target is torch.ops.adept_fx.attention.default)
    meta.update(query, border=1)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_no_border, "out of order"),
        (_swapped_borders, "out of order"),
        (_write_before, "kv_1 is not written in layer 0"),
        (_write_behind, "kv_1 is not written in layer 2"),
        (_write_outside, "kv_1 is written outside of the layers"),
        (_border_within_attention, r"no \[batch, tokens, hidden\]"),
    ],
)
def test_a_broken_guarantee_is_caught(spoil, match: str) -> None:  # type: ignore[no-untyped-def]
    assert_caught(FindLayers, before(FindLayers, "llama", 3), spoil, match)
