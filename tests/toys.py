"""Llama decoders that each do one thing which Llama itself does not."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from adept_fx.capture import Capture, capture
from adept_fx.graph.base import Pass, Work
from adept_fx.graph.runner import run_passes
from adept_fx.kv import KVPolicy
from adept_fx.pipeline import PIPELINE, start
from models import randomize, tiny

LAYERS, NOTE = 3, 5


class Layer(LlamaDecoderLayer):
    """Passes on what it is handed besides the state."""

    def __init__(self, config: Any, at: int) -> None:
        super().__init__(config, at)
        self.at = at
        self.gate = nn.Linear(config.hidden_size, NOTE, bias=False)
        self.use = nn.Linear(NOTE, config.hidden_size, bias=False)

    def forward(  # type: ignore[override]
        self, hidden: Tensor, carried: Tensor | None, **common: Any
    ) -> tuple[Tensor, Tensor | None]:
        return super().forward(hidden, **common), carried

    def read(self, state: Tensor, carried: Tensor) -> Tensor:
        return state + self.use(torch.sigmoid(self.gate(state)) * carried)


class Toy(LlamaModel):
    """Layers in a row, which hand something on besides the state."""

    layer_class: type[Layer] = Layer
    kinds: tuple[str, ...] | None = None  # of the cache's layers, if they are not all alike

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        count = config.num_hidden_layers
        self.layers = nn.ModuleList(self.layer_class(config, at) for at in range(count))

    def before(self, input_ids: Tensor | None, embeds: Tensor) -> Tensor | None:
        """What the first layer is handed."""
        return None

    def after(self, hidden: Tensor, carried: Tensor | None) -> Tensor:
        """What the final norm reads."""
        return hidden

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        shared = {
            "inputs_embeds": embeds,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        common = {
            "attention_mask": create_causal_mask(config=self.config, **shared),
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "position_embeddings": self.rotary_emb(embeds, position_ids=position_ids),
        }
        hidden, carried = embeds, self.before(input_ids, embeds)
        for layer in self.layers:
            hidden, carried = layer(hidden, carried, **common)
        return BaseModelOutputWithPast(self.norm(self.after(hidden, carried)), past_key_values)


class NotingLayer(Layer):
    """The first makes a narrow value of its input, which all later ones read."""

    def __init__(self, config: Any, at: int) -> None:
        super().__init__(config, at)
        if at == 0:
            self.note = nn.Linear(config.hidden_size, NOTE, bias=False)

    def forward(  # type: ignore[override]
        self, hidden: Tensor, carried: Tensor | None, **common: Any
    ) -> tuple[Tensor, Tensor | None]:
        state, _ = super().forward(hidden, carried, **common)
        if carried is None:
            return state, self.note(hidden)
        return self.read(state, carried), carried


class Noting(Toy):
    layer_class = NotingLayer


class RowNotingLayer(NotingLayer):
    """Its note is one per row: that of the row's first token."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, carried: Tensor | None, **common: Any
    ) -> tuple[Tensor, Tensor | None]:
        state, carried = super().forward(hidden, carried, **common)
        assert carried is not None
        return state, carried[:, :1]


class RowNoting(Toy):
    layer_class = RowNotingLayer


class NotingToTheEnd(Noting):
    """Reads the note once more behind the last layer."""

    def after(self, hidden: Tensor, carried: Tensor | None) -> Tensor:
        assert carried is not None
        return hidden * carried.mean(-1, keepdim=True)


class PieceLayer(Layer):
    """Reads its own piece of what was made before the layers."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, carried: Tensor | None, **common: Any
    ) -> tuple[Tensor, Tensor | None]:
        state, _ = super().forward(hidden, carried, **common)
        assert carried is not None
        return self.read(state, carried[:, :, self.at]), carried


class Prepared(Toy):
    """A value of a width of its own, made of the embedding and of `input_ids` again."""

    layer_class = PieceLayer

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.num_hidden_layers * NOTE
        self.per_layer = nn.Embedding(config.vocab_size, width)
        self.project = nn.Linear(config.hidden_size, width, bias=False)

    def before(self, input_ids: Tensor | None, embeds: Tensor) -> Tensor:
        assert input_ids is not None
        found = self.per_layer(input_ids) + self.project(embeds)
        return found.unflatten(-1, (-1, NOTE))


class TwiceAttention(LlamaAttention):
    """Attends twice to the same keys, the second time more sharply."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        query, key, value = (
            part(hidden_states).view(shape).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        chosen = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, eager_attention_forward)
        first, second = (
            attend(self, query, key, value, attention_mask, scaling=factor * self.scaling)[0]
            for factor in (1, 3)
        )
        mixed = first - 0.5 * second
        return self.o_proj(mixed.reshape(*hidden_states.shape[:2], -1)), None


class TwiceLayer(Layer):
    def __init__(self, config: Any, at: int) -> None:
        super().__init__(config, at)
        self.self_attn = TwiceAttention(config, at)


class Twice(Toy):
    layer_class = TwiceLayer


class Encoding(Toy):
    """Makes a mask for both directions: of an encoder that is not there, or of its own tokens."""

    of_its_own = False

    def before(self, input_ids: Tensor | None, embeds: Tensor) -> None:
        real = torch.ones(embeds.shape[:2], dtype=torch.long) if self.of_its_own else None
        create_bidirectional_mask(config=self.config, inputs_embeds=embeds, attention_mask=real)


class EncodingItself(Encoding):
    of_its_own = True


def toy(kind: type[Toy], layers: int = LAYERS) -> Any:
    """A causal LM around such a decoder."""
    fields: dict[str, Any] = {} if kind.kinds is None else {"layer_types": kind.kinds}
    model: Any = tiny("llama", layers=layers, **fields)
    model.model = kind(model.config).eval()
    randomize(model, 0)
    return model


@cache
def captured(kind: Any) -> Capture:
    return capture(toy(kind).model, positions=True)


def work_of(
    kind: Any,
    until: type[Pass] | None = None,
    exits: tuple[int, ...] = (1, 2),
    needs: tuple[str, ...] = (),
) -> Work:
    """The graph of such a decoder, just before a pass (or after the last)."""
    asked = tuple(frozenset(needs) for _ in exits)
    work = start(captured(kind), exits, asked, KVPolicy())
    work = replace(work, graph=deepcopy(work.graph))
    steps = PIPELINE if until is None else PIPELINE[: PIPELINE.index(until)]
    run_passes(work, [step() for step in steps])
    return work
