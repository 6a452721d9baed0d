"""Counts what is compiled while batch sizes and exits change from step to step."""

from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import StaticCache

import adept_fx
from adept_fx.bench.runner import Setting, forget
from adept_fx.gates import Replay
from adept_fx.runtime.plan import PLANS

_PROMPT, _SPACE = 16, 64


@torch.no_grad()
def count(
    model: Any, setting: Setting, steps: int = 500, warm_up: int = 100, backend: str = "inductor"
) -> dict[str, int]:
    """Decodes with random exits at batch sizes 1..8, and counts graphs compiled after a warm-up.

    Args:
        model: The plain model.
        setting: How to compile, and the exit points.
        steps: Steps that count.
        warm_up: Steps before them, by every plan in turn.
        backend: As in ``torch.compile``.

    Returns:
        ``steps``, ``warm_up`` (steps before counting), ``compiled`` (graphs until then) and
        ``graphs`` (from then on).
    """
    forget(model)
    config = adept_fx.ExitConfig(exits=setting.exits, gate=Replay([]), threshold=0.5)
    ee = adept_fx.transform(model, config)
    ee.adept.compile(mode=setting.mode, backend=backend)
    generator = torch.Generator().manual_seed(0)
    walk = _Walk(ee, generator)
    try:
        started = counters["stats"]["unique_graphs"]
        for step in range(warm_up):
            # What is seldom chosen is compiled as well.
            ee.adept.plan = PLANS[step % len(PLANS)]
            walk.step()
        ee.adept.plan = "auto"
        before = counters["stats"]["unique_graphs"]
        for _ in range(steps):
            walk.step()
        after = counters["stats"]["unique_graphs"]
    finally:
        adept_fx.restore(ee)
        forget(model)
    return {
        "steps": steps,
        "warm_up": warm_up,
        "compiled": before - started,
        "graphs": after - before,
    }


class _Walk:
    """One step after the other, each in a batch of a random size."""

    def __init__(self, ee: Any, generator: torch.Generator) -> None:
        self.ee = ee
        self.generator = generator
        self.caches: dict[int, Any] = {}
        self.lengths: dict[int, int] = {}

    def step(self) -> None:
        """Decodes one token per row; a new prompt first where the cache is full."""
        batch = int(torch.randint(1, 9, (), generator=self.generator))
        if self.lengths.get(batch, _SPACE) >= _SPACE:
            self._prefill(batch)
        self._call(batch, 1)

    def _prefill(self, batch: int) -> None:
        self.caches[batch] = StaticCache(config=self.ee.config, max_cache_len=_SPACE)
        self.lengths[batch] = 0
        self._call(batch, _PROMPT)

    def _call(self, batch: int, tokens: int) -> None:
        adept = self.ee.adept
        exits = len(adept.config.exit_layers)
        # How likely a token is to leave changes from step to step: none, some and all of them.
        likely = torch.rand((), generator=self.generator) * 1.2
        scores = torch.rand(exits, batch, tokens, generator=self.generator) * likely
        device = self.ee.device
        adept.set_gates(Replay([scores.to(device)]))
        shape = (batch, tokens)
        ids = torch.randint(0, self.ee.config.vocab_size, shape, generator=self.generator)
        start = self.lengths[batch]
        places = torch.arange(start, start + tokens).expand(shape)
        self.ee(
            ids.to(device),
            position_ids=places.to(device),
            past_key_values=self.caches[batch],
            logits_to_keep=1,
        )
        self.lengths[batch] = start + tokens
