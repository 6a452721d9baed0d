"""What a graph reads of a call, by the names of its inputs."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from adept_fx.errors import InputError
from adept_fx.intercept import FULL
from adept_fx.runtime.call import Call, read_call
from adept_fx.runtime.inputs import key_length, program_inputs
from models import WINDOW, tiny

SLIDING = "sliding_attention"
KINDS = {0: SLIDING, 1: FULL}
IDS = torch.arange(1, 9).view(2, 4)


def model(kind: str = "gemma3_text") -> Any:
    """Its layers are sliding and full in turn."""
    return tiny(kind, layers=2)


def called(decoder: Any, **given: Any) -> Call:
    signature = inspect.signature(type(decoder).forward)
    signature = signature.replace(parameters=list(signature.parameters.values())[1:])
    return read_call(decoder, signature, (), given)


def inputs(decoder: Any, names: tuple[str, ...], **given: Any) -> list[Any]:
    program: Any = SimpleNamespace(inputs=names, masks={}, kinds=KINDS)
    return program_inputs(program, called(decoder, **given))


def caches(decoder: Any) -> dict[str, Any]:
    config = decoder.config
    return {
        "dynamic": DynamicCache(config=config),
        "static": StaticCache(config=config, max_cache_len=20),
    }


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_key_lengths_are_those_that_the_layers_really_see(kind: str) -> None:
    decoder = model().get_decoder()
    cache = caches(decoder)[kind]
    seen: dict[int, int] = {}
    update = cache.update

    def watched(keys: Tensor, values: Tensor, layer: int, *rest: Any, **more: Any) -> Any:
        found = update(keys, values, layer, *rest, **more)
        seen[layer] = found[0].shape[2]
        return found

    cache.update = watched
    lengths = []
    for tokens in (4, 3, 1, 1):
        ids = IDS[:, :1].expand(2, tokens)
        call = called(decoder, input_ids=ids, past_key_values=cache)
        found = {at: key_length(call, KINDS, kind) for at, kind in KINDS.items()}
        decoder(ids, past_key_values=cache)
        assert found == seen
        lengths.append(found)
    if kind == "dynamic":
        assert [found[1] for found in lengths] == [4, 7, 8, 9]
        assert lengths[-1][0] == WINDOW
    else:
        assert [found[1] for found in lengths] == [20] * 4


def test_without_a_cache_there_are_as_many_keys_as_tokens() -> None:
    decoder = model().get_decoder()
    call = called(decoder, input_ids=IDS, use_cache=False)
    assert call.cache is None
    assert key_length(call, KINDS, SLIDING) == IDS.shape[1]


def test_a_kind_that_no_layer_has_is_as_long_as_the_text() -> None:
    decoder = model().get_decoder()
    cache = DynamicCache(config=decoder.config)
    with torch.no_grad():
        decoder(IDS, past_key_values=cache)
    call = called(decoder, input_ids=IDS, past_key_values=cache)
    assert key_length(call, KINDS, "chunked_attention") == 2 * IDS.shape[1]


def test_lengths_come_as_shapes_and_cost_no_memory() -> None:
    decoder = model().get_decoder()
    cache = DynamicCache(config=decoder.config)
    with torch.no_grad():
        decoder(IDS, past_key_values=cache)
    names = ("past", f"slots_{FULL}", f"slots_{SLIDING}")
    past, full, sliding = inputs(decoder, names, input_ids=IDS, past_key_values=cache)
    assert past.shape == (4,)
    assert full.shape == (2, 8)
    assert sliding.shape == (2, 8)
    assert {item.device.type for item in (past, full, sliding)} == {"meta"}


def test_ids_are_handed_on_and_missed_if_only_embeddings_were_given() -> None:
    decoder = model().get_decoder()
    (ids,) = inputs(decoder, ("input_ids",), input_ids=IDS)
    assert torch.equal(ids, IDS)
    embeds = decoder.get_input_embeddings()(IDS)
    with pytest.raises(InputError, match=r"reads input_ids besides .*\n?.*pass input_ids"):
        inputs(decoder, ("input_ids",), inputs_embeds=embeds)
    (found,) = inputs(decoder, ("inputs_embeds",), inputs_embeds=embeds)
    assert found is embeds


def test_a_decoder_that_computes_with_the_mask_gets_one_of_ones_by_default() -> None:
    decoder = model().get_decoder()
    cache = DynamicCache(config=decoder.config)
    with torch.no_grad():
        decoder(IDS, past_key_values=cache)
    given = {"input_ids": IDS, "past_key_values": cache}
    (mask,) = inputs(decoder, ("attention_mask",), **given)
    assert torch.equal(mask, torch.ones(2, 8, dtype=torch.long))
    padded = torch.ones(2, 8, dtype=torch.bool)
    padded[0, :2] = False
    (mask,) = inputs(decoder, ("attention_mask",), attention_mask=padded, **given)
    assert mask.dtype == torch.long
    assert torch.equal(mask.bool(), padded)
    for other in (padded[:, None, None].expand(2, 1, 4, 8), {FULL: padded}):
        with pytest.raises(InputError, match="the 2-D attention_mask"):
            inputs(decoder, ("attention_mask",), attention_mask=other, **given)
