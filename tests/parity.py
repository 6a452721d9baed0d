"""Real exits for `generate`: a gate on the state itself, and an original that obeys the same one.

The reference is forward hooks on the original model's layers, as in `oracle`, but they decide by
themselves: so any way to call the original, `generate` with all its modes, has its counterpart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import adept_fx
from adept_fx import ExitConfig
from adept_fx.gates import Gate, GateInputs
from models import tiny
from oracle import decoder_layers
from product import EXITS, raw, rewritten

SMALL_EXITS = (1,)  # of `small`
PLANS = ("dense", "compact", "auto")
# Rows of three lengths, padded on the left.
IDS = torch.tensor(
    [
        [0, 0, 5, 6, 7, 21, 22, 23, 24],
        [9, 8, 7, 6, 5, 4, 3, 11, 12],
        [0, 11, 12, 13, 14, 31, 32, 33, 34],
    ]
)
PADDED: dict[str, Tensor] = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
FULL: dict[str, Tensor] = {"input_ids": IDS + 3, "attention_mask": torch.ones_like(IDS)}
ONE: dict[str, Tensor] = {name: value[1:2] for name, value in PADDED.items()}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}
SAMPLED: dict[str, Any] = {"do_sample": True, "max_new_tokens": 8, "top_k": 20, "temperature": 1.5}


def leaves(hidden: Tensor, exit_index: int) -> Tensor:
    """About every other token: one number of its state decides."""
    return hidden[..., exit_index] > 0


class Parity(Gate):
    """Lets go what `leaves` says."""

    def forward(self, tokens: GateInputs) -> Tensor:
        return leaves(tokens.hidden, tokens.exit_index).float()


class _Frozen:
    """The states of one forward's tokens that have left."""

    def __init__(self, exits: Sequence[int]) -> None:
        self.exits = tuple(exits)
        self.gone = torch.zeros(0, dtype=torch.bool)
        self.state = torch.zeros(0)

    def after(self, count: int, hidden: Tensor) -> Tensor:
        """The output of layer `count - 1`, with the states of those that left put back."""
        if count == 1:
            self.gone, self.state = torch.zeros_like(hidden[..., 0], dtype=torch.bool), hidden
        hidden = torch.where(self.gone[..., None], self.state, hidden)
        if count in self.exits:
            new = leaves(hidden, self.exits.index(count)) & ~self.gone
            self.state = torch.where(new[..., None], hidden, self.state)
            self.gone = self.gone | new
        return hidden


@contextmanager
def exiting(model: PreTrainedModel, exits: Sequence[int] = EXITS) -> Iterator[Any]:
    """Inside, tokens of the original leave as `Parity` says, after any number of forwards."""
    layers = decoder_layers(model)
    frozen = _Frozen([count for count in exits if count < len(layers)])

    def hook_of(count: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            whole = isinstance(output, tuple)
            hidden = frozen.after(count, output[0] if whole else output)
            return (hidden, *output[1:]) if whole else hidden

        return hook

    handles = [layer.register_forward_hook(hook_of(i + 1)) for i, layer in enumerate(layers)]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def prepared(ee: Any, plan: str, threshold: float = 0.5) -> Any:
    """The rewritten model with `Parity`, whatever a test has set before."""
    ee.adept.set_gates(Parity())
    ee.adept.plan, ee.adept.thresholds = plan, threshold
    ee.adept.stats.reset()
    return ee


@cache
def small(model_type: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model of two layers and its rewritten form with one exit: quick to capture again."""
    model = tiny(model_type, dtype, layers=2)
    config = ExitConfig(exits=SMALL_EXITS, gate=Parity(), threshold=0.5)
    return model, adept_fx.transform(model, config)


def pair(model_type: str) -> tuple[Any, Any]:
    """The llama of four layers and two exits that all tests share, or a `small` one."""
    if model_type == "llama":
        return raw(model_type), rewritten(model_type)
    return small(model_type)


def parity(model_type: str, plan: str, threshold: float = 0.5) -> Any:
    """The rewritten model of a `pair`, prepared."""
    return prepared(pair(model_type)[1], plan, threshold)


def says(model: Any, prompt: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """What `generate` returns, with the same seed each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        out = model.generate(**prompt, **options)
    return out if isinstance(out, Tensor) else out.sequences


def some_left(ee: Any) -> None:
    """Tokens have really left, and others have not."""
    stats = ee.adept.stats
    exited, seen = (sum(map(sum, part.values())) for part in (stats.exited, stats.seen))
    assert 0 < exited < seen, stats.as_dict()
    assert stats.needed_token_layers < stats.total_token_layers


def none_left(ee: Any) -> None:
    """Gates were asked, and no token has left."""
    stats = ee.adept.stats
    assert sum(map(sum, stats.seen.values())) > 0
    assert stats.needed_token_layers == stats.total_token_layers


def check_generate(
    model_type: str, prompt: dict[str, Tensor], options: Callable[[Any], dict[str, Any]]
) -> None:
    """With threshold 1.0 the original's tokens; with real exits, in every plan, the reference's.

    `options` makes the arguments of one call, for the model that is called: caches are not shared.
    """
    model, ee = pair(model_type)
    prepared(ee, "dense", threshold=1.0)
    never = says(ee, prompt, options(ee))
    none_left(ee)
    assert torch.equal(never, says(model, prompt, options(model))), "nothing leaves"
    with exiting(model):
        want = says(model, prompt, options(model))
    for plan in PLANS:
        got = says(prepared(ee, plan), prompt, options(ee))
        some_left(ee)
        assert torch.equal(got, want), f"plan={plan}: {got}, not {want}"
