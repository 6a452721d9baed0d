"""Counts what is compiled while batch sizes and exits change from step to step."""

from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import StaticCache

import adept_fx
from adept_fx.bench.runner import Setting, forget
from adept_fx.gates import Replay
from adept_fx.runtime.plan import PLANS

_PROMPT, _SPACE = 16, 64


@torch.no_grad()
def count(
    model: Any, setting: Setting, steps: int = 500, backend: str = "inductor"
) -> dict[str, int]:
    """Decodes with random exits at batch sizes 1..8, and counts graphs compiled after a warm-up.

    The warm-up is a prompt and a token of one row and of three, by every plan, where none, all or
    half of the rows leave at every exit point, and where the others leave at every later one.

    Args:
        model: The plain model.
        setting: How to compile, and the exit points.
        steps: Steps that count.
        backend: As in ``torch.compile``.

    Returns:
        ``steps``, ``warm_up`` (steps before counting), ``compiled`` (graphs until then) and
        ``graphs`` (from then on).
    """
    forget(model)
    config = adept_fx.ExitConfig(exits=setting.exits, gate=Replay([]), threshold=0.5)
    ee = adept_fx.transform(model, config)
    ee.adept.compile(mode=setting.mode, backend=backend)
    walk = _Walk(ee)
    try:
        started = counters["stats"]["unique_graphs"]
        warm_up = walk.warm_up()
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

    def __init__(self, ee: Any) -> None:
        self.ee = ee
        self.exits = len(ee.adept.config.exit_layers)
        self.generator = torch.Generator().manual_seed(0)
        self.caches: dict[int, Any] = {}
        self.lengths: dict[int, int] = {}

    def warm_up(self) -> int:
        """Lets tokens leave in all ways that lead to other code; returns how many steps it took."""
        adept = self.ee.adept
        everywhere = range(self.exits)
        ways = [(None, None), *((first, first) for first in everywhere)]
        ways += [(first, None) for first in everywhere]
        ways += [(first, last) for first in everywhere for last in range(first + 1, self.exits)]
        steps = 0
        for batch in (1, 3):
            for adept.plan in PLANS:
                for first, last in ways:
                    self._start(batch)
                    for tokens in (_PROMPT, 1):
                        self._call(batch, self._leaving(batch, tokens, first, last))
                    steps += 1
        adept.plan = "auto"
        return steps

    def _leaving(self, batch: int, tokens: int, first: int | None, last: int | None) -> Tensor:
        """Half leave at one exit, the others at another."""
        scores = torch.zeros(self.exits, batch * tokens)
        half = (batch * tokens + 1) // 2
        if first is not None:
            scores[first, :half] = 1.0
        if last is not None:
            scores[last, half:] = 1.0
        return scores.view(self.exits, batch, tokens)

    def step(self) -> None:
        """Decodes one token per row; a new prompt first where the cache is full."""
        batch = int(torch.randint(1, 9, (), generator=self.generator))
        if self.lengths.get(batch, _SPACE) >= _SPACE:
            self._start(batch)
            self._call(batch, self._random(batch, _PROMPT))
        self._call(batch, self._random(batch, 1))

    def _start(self, batch: int) -> None:
        self.caches[batch] = StaticCache(config=self.ee.config, max_cache_len=_SPACE)
        self.lengths[batch] = 0

    def _random(self, batch: int, tokens: int) -> Tensor:
        # How likely a token is to leave changes from step to step: none, some and all of them.
        likely = torch.rand((), generator=self.generator) * 1.2
        return torch.rand(self.exits, batch, tokens, generator=self.generator) * likely

    def _call(self, batch: int, scores: Tensor) -> None:
        device, tokens = self.ee.device, scores.shape[-1]
        self.ee.adept.set_gates(Replay([scores.to(device)]))
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
