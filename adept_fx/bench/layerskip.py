"""Against self-speculation by `generate(assistant_early_exit=...)` on the same weights."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import adept_fx
from adept_fx.bench.runner import Setting
from adept_fx.gates import FixedDepth

_PROMPT, _NEW, _ROUNDS = 64, 48, 5


@torch.no_grad()
def against_layerskip(model: Any, setting: Setting, exit_layer: int) -> dict[str, float]:
    """Tokens per second of three ways to generate greedily, batch 1, without compilation.

    LayerSkip's self-speculation (Elhoushi et al. 2024, arXiv:2404.16710), as transformers has it,
    drafts with the first layers and verifies with all: it gives the original's text, at a speed
    that depends on how often the two agree. Exits that let every token go give the draft's text.
    """
    config = adept_fx.ExitConfig(exits=(exit_layer,), gate=FixedDepth(0), threshold=0.5)
    ee = adept_fx.transform(model, config)
    ids = torch.randint(
        0, model.config.vocab_size, (1, _PROMPT), generator=torch.Generator().manual_seed(0)
    ).to(model.device)
    plain = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": _NEW,
        "min_new_tokens": _NEW,
        "do_sample": False,
        "pad_token_id": 0,
    }
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: model.generate(ids, **plain),
        f"layerskip, draft of {exit_layer} layers": lambda: model.generate(
            ids, assistant_early_exit=exit_layer, **plain
        ),
        f"exits, all out at {exit_layer}": lambda: ee.generate(ids, **plain),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(_ROUNDS + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if number:  # the first round warms up
                taken[name].append(time.perf_counter() - began)
    return {name: _NEW / statistics.median(seconds) for name, seconds in taken.items()}
