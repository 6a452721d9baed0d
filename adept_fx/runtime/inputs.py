"""What a program reads of a call: embeddings, positions, masks, lengths."""

from typing import Any

import torch
from torch import Tensor

from adept_fx.errors import InputError
from adept_fx.pipeline import Program
from adept_fx.runtime.call import Call
from adept_fx.runtime.masks import build_mask, past_length

_SLOTS, _EXTRAS = "slots_", "extras_"


def program_inputs(program: Program, call: Call, masks: bool = True) -> list[Any]:
    """The arguments of ``program.graph`` after the run, in order.

    Args:
        program: The program.
        call: The call of the decoder.
        masks: Build the masks; else they are None.

    Raises:
        InputError: The decoder needs something that the call does not have.
    """
    return [
        _input(name, program, call) if masks or name not in program.masks else None
        for name in program.inputs
    ]


def _input(name: str, program: Program, call: Call) -> Any:
    if name == "inputs_embeds":
        return call.embeds
    if name == "position_ids":
        return call.position_ids
    if name == "input_ids":
        return _ids(call)
    if name == "attention_mask":
        return _mask_2d(call)
    if name.startswith(_EXTRAS):
        return call.extras[name.removeprefix(_EXTRAS)]
    if name == "past":
        # Only its length is read; so with the others below.
        return torch.empty(past_length(call.cache), device="meta")
    if name.startswith(_SLOTS):
        length = key_length(call, program.kinds, name.removeprefix(_SLOTS))
        return torch.empty(call.embeds.shape[0], length, device="meta")
    return build_mask(
        program.masks[name], call.attention_mask, call.embeds, call.cache, call.position_ids
    )


def token_positions(call: Call) -> Tensor:
    """The place of each token of a call in its row, without padding, ``[B, S]`` int64.

    What the call says of it counts; else its 2-D mask tells which tokens before it are padding.
    """
    if call.position_ids is not None:
        return call.position_ids.long()
    batch, tokens = call.embeds.shape[:2]
    offset, mask = past_length(call.cache), call.attention_mask
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= offset + tokens:
        real = mask[:, : offset + tokens].to(call.embeds.device).bool()
        return (real.cumsum(1) - 1).clamp(min=0)[:, offset:].expand(batch, tokens)
    places = torch.arange(offset, offset + tokens, device=call.embeds.device)
    return places.expand(batch, tokens)


def key_length(call: Call, kinds: dict[int, str], kind: str) -> int:
    """How many keys layers of a kind attend to in this call."""
    tokens = call.embeds.shape[1]
    layer = next((at for at, found in kinds.items() if found == kind), None)
    if call.cache is None or layer is None:
        return past_length(call.cache) + tokens
    return int(call.cache.get_mask_sizes(tokens, layer)[0])


def _ids(call: Call) -> Tensor:
    if call.ids is None:
        raise InputError(
            "this decoder reads input_ids besides their embedding; the call has inputs_embeds only",
            hint="pass input_ids",
        )
    return call.ids


def _mask_2d(call: Call) -> Tensor:
    mask = call.attention_mask
    if mask is None:
        length = past_length(call.cache) + call.embeds.shape[1]
        return torch.ones(call.embeds.shape[0], length, dtype=torch.long, device=call.embeds.device)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise InputError(
            "this decoder computes with the 2-D attention_mask; it was given another kind",
            hint="pass a 2-D mask, e.g. generate without a static cache",
        )
    return mask.to(device=call.embeds.device, dtype=torch.long)
