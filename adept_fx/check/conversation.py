"""A short conversation with a model, as a check holds it: a padded prompt, then single tokens."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

THRESHOLD = 0.5
_LENGTHS = (9, 5)  # tokens of each row's prompt: longer than a tiny model's window
_STEPS = 4


@dataclass(frozen=True)
class Turn:
    """One forward: tokens ``ids [B, S]``, which of them are real, and all columns so far."""

    ids: Tensor
    real: Tensor
    seen: Tensor

    def inputs(self, model: Any) -> dict[str, Tensor]:
        """The arguments that ``generate`` would pass."""
        given = {"input_ids": self.ids, "attention_mask": self.seen.long()}
        if "position_ids" in inspect.signature(type(model).forward).parameters:
            positions = (self.seen.cumsum(-1) - 1).clamp(min=0)
            given["position_ids"] = positions[:, -self.ids.shape[1] :]
        return given


@dataclass
class Trace:
    """What a model said in each turn: ``logits``, ``[B, S, V]``, and the cache that remains."""

    logits: list[Tensor]
    cache: Any


def conversation(vocab: int, seed: int = 0) -> list[Turn]:
    """Two rows, the shorter one padded on the left, a prompt and four more tokens."""
    generator = torch.Generator().manual_seed(seed)
    prompt = max(_LENGTHS)
    real = torch.ones(len(_LENGTHS), prompt + _STEPS, dtype=torch.bool)
    for row, length in enumerate(_LENGTHS):
        real[row, : prompt - length] = False
    ids = torch.randint(3, vocab, real.shape, generator=generator)
    spans = [(0, prompt), *((at, at + 1) for at in range(prompt, prompt + _STEPS))]
    return [Turn(ids[:, a:b], real[:, a:b], real[:, :b]) for a, b in spans]


def scores(turns: list[Turn], exits: int, seed: int = 1) -> list[Tensor]:
    """Scores ``[exits, B, S]`` per turn: mixed; in one turn all leave early, in one none does."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(exits, *turn.ids.shape, generator=generator) for turn in turns]
    drawn[-1] = drawn[-1] / 2
    drawn[-2] = 0.5 + drawn[-2] / 2
    drawn[-2].clamp_(min=THRESHOLD + 1e-3)
    return drawn


Around = Callable[[int], AbstractContextManager[Any]]


@torch.no_grad()
def play(model: Any, turns: list[Turn], around: Around = lambda index: nullcontext()) -> Trace:
    """Holds the conversation; ``around`` is entered for each turn."""
    trace = Trace([], None)
    for index, turn in enumerate(turns):
        with around(index):
            output = model(**turn.inputs(model), past_key_values=trace.cache, use_cache=True)
        trace.logits.append(output.logits)
        trace.cache = output.past_key_values
    return trace


def difference(got: Trace, want: Trace, turns: list[Turn], tolerance: float) -> str:
    """Says where two traces differ by more than ``tolerance`` of a tensor's largest value.

    Compared are logits at real tokens and every tensor of every cache layer, at real columns.
    Empty if they agree.
    """
    for index, turn in enumerate(turns):
        found = _differ(got.logits[index][turn.real], want.logits[index][turn.real], tolerance)
        if found:
            return f"logits of turn {index}: {found}"
    seen = turns[-1].seen
    for layer, (ours, theirs) in enumerate(zip(_layers(got), _layers(want), strict=True)):
        named = _tensors(ours, seen)
        for name, value in _tensors(theirs, seen).items():
            if name not in named:
                return f"cache layer {layer} lacks {name}"
            found = _differ(named[name], value, tolerance)
            if found:
                return f"{name} of cache layer {layer}: {found}"
    return ""


def _layers(trace: Trace) -> list[Any]:
    """Cache layers; of a decoder with cross-attention, those of its own tokens."""
    cache = getattr(trace.cache, "self_attention_cache", trace.cache)
    return list(cache.layers)


def _tensors(layer: Any, seen: Tensor) -> dict[str, Tensor]:
    """The floating-point tensors that a cache layer holds, zero at padding.

    Those in dicts are states, of which each row has one, whatever its padding.
    """
    found: dict[str, Tensor] = {}
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            states = {f"{name}{key}": item for key, item in value.items() if _is_float(item)}
            found |= states
        elif _is_float(value):
            found[name] = _visible(value, seen)
    return found


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _visible(value: Tensor, seen: Tensor) -> Tensor:
    """The entries of real tokens, if the value has an axis of columns; else all of it."""
    rows, columns = seen.shape
    if value.shape[:1] != (rows,):
        return value
    axis = -2 if value.ndim >= 3 else -1
    length = value.shape[axis]
    if value.ndim < 3 or length > columns:
        return value
    held = seen[:, columns - length :]
    shape = [rows] + [1] * (value.ndim - 1)
    shape[axis] = length
    return torch.where(held.view(shape), value, 0.0)


def _differ(got: Tensor, want: Tensor, tolerance: float) -> str:
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype} {tuple(got.shape)}, not {want.dtype} {tuple(want.shape)}"
    if not got.numel():
        return ""
    if not bool(torch.isfinite(want).all()):
        return "the original is not finite"
    error, size = (got - want).abs().max().item(), want.abs().max().item()
    if error <= tolerance * size:
        return ""
    return f"off by {error:.2g}, where the largest value is {size:.2g}"
