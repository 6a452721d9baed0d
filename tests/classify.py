"""Classifiers for the tests: tiny models, calls, and what the oracle says of a row that ends."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

import adept_fx
from adept_fx.gates import Replay
from dialogue import THRESHOLD
from models import VOCAB, randomize, tiny_config
from oracle import Oracle, depths
from product import EXITS, LAYERS, set_up

LABELS = 3
_KINDS: dict[str, Any] = {
    "rows": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
}


def classifier(model_type: str, kind: str = "rows", **overrides: Any) -> Any:
    """A seeded classifier in eval mode."""
    config = tiny_config(model_type, LAYERS, num_labels=LABELS, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _KINDS[kind].from_config(config, dtype=torch.float32).eval()
    randomize(model, 0)
    return model


def rewrite(model: nn.Module) -> Any:
    config = adept_fx.ExitConfig(exits=EXITS, gate=Replay([]), threshold=THRESHOLD)
    return adept_fx.transform(model, config)


@cache
def pair(model_type: str, kind: str = "rows") -> tuple[Any, Any]:
    """An original and its rewritten form; tests share them, and leave the original alone."""
    model = classifier(model_type, kind)
    return model, rewrite(model)


def padded(lengths: Sequence[int], side: str, columns: int) -> Tensor:
    """Which tokens are real, `[B, S]`."""
    step, length = torch.arange(columns)[None], torch.tensor(lengths)[:, None]
    return step < length if side == "right" else step >= columns - length


def ids_of(real: Tensor, seed: int = 0) -> Tensor:
    """Token ids, 0 at padding and nowhere else."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, real.shape, generator=generator) * real


def inputs(model_type: str, real: Tensor, seed: int = 0) -> dict[str, Tensor]:
    given = {"input_ids": ids_of(real, seed), "attention_mask": real.long()}
    if model_type != "bloom":  # which counts by the mask
        given["position_ids"] = (real.cumsum(-1) - 1).clamp(min=0)
    return given


def draw(real: Tensor, leave: float = 0.4, seed: int = 0) -> Tensor:
    """Who wants to leave where, `[exits, B, S]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(EXITS), *real.shape, generator=generator) < leave


def last(real: Tensor) -> Tensor:
    """The rightmost real token of each row, as `[B, S]`."""
    step = torch.arange(real.shape[1])
    return step == (step * real).argmax(-1, keepdim=True)


def stopped(wants: Tensor, real: Tensor, pooled: Tensor) -> Tensor:
    """The same exits where a row leaves as a whole once all its pooled tokens have."""
    depth = depths(wants, EXITS, LAYERS, real)
    stop = torch.where(pooled & real, depth, 0).amax(-1)
    return wants | torch.stack([(stop == count)[:, None].expand_as(real) for count in EXITS])


def run(model: Any, decoder: nn.Module, given: dict[str, Any]) -> tuple[Any, Tensor]:
    """The output, and the decoder's last hidden state."""
    seen: list[Tensor] = []
    handle = decoder.register_forward_hook(lambda _m, _a, out: seen.append(out.last_hidden_state))
    try:
        with torch.no_grad():
            output = model(**given)
    finally:
        handle.remove()
    assert len(seen) == 1
    return output, seen[0]


def run_oracle(
    model: Any, given: dict[str, Any], wants: Tensor, real: Tensor
) -> tuple[Any, Tensor, Tensor]:
    """Output, hidden state and depths of the original with these exits, hooked in."""
    with Oracle(model, EXITS).exits_for(wants, real) as exits:
        output, hidden = run(model, model.get_decoder(), given)
    return output, hidden, exits.depth


# A call that several tests share.
REAL = padded((9, 3, 7, 5, 9), "left", columns=10)
POOLED = last(REAL)
WANTS = draw(REAL, seed=5)
DEPTH = depths(WANTS, EXITS, LAYERS, REAL)
ENDED = depths(stopped(WANTS, REAL, POOLED), EXITS, LAYERS, REAL)
assert not torch.equal(DEPTH, ENDED)


def ready(model_type: str, plan: str = "auto", threshold: float = 0.5) -> tuple[Any, Any, Any]:
    model, ee = pair(model_type)
    set_up(ee, [WANTS.float()] * 3, plan, threshold)
    return model, ee, inputs(model_type, REAL)
