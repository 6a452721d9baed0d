"""Texts read the way they are generated: a prompt at once, then token by token, with a cache."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import StaticCache

PHASES = ("prefill", "decode")


@dataclass
class Reading:
    """What a model said of some texts, and how long that took.

    Attributes:
        seconds: Per phase.
        said: Most likely next tokens, `[rows, columns]`, per batch of texts.
        loss: Sum of the negative log-likelihoods of the true next tokens, in nats, per phase.
        tokens: Number of them, per phase.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    said: list[Tensor] = field(default_factory=list)
    loss: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood in nats."""
        return sum(self.loss.values()) / sum(self.tokens.values())

    @property
    def total(self) -> float:
        """Seconds in both phases."""
        return sum(self.seconds.values())

    def agreement(self, other: Reading) -> float:
        """Share of the tokens of which both say the same."""
        pairs = zip(self.said, other.said, strict=True)
        return float(torch.cat([(a == b).flatten() for a, b in pairs]).double().mean())


@torch.no_grad()
def read(model: Any, ids: Tensor, prompt: int, into: Reading) -> None:
    """Reads `ids [rows, columns]`: the first `prompt` columns at once, the others one by one.

    Every true token is given, whatever the model says: so all models read the same.
    """
    columns = ids.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=columns)
    places = torch.arange(columns, device=ids.device).expand(ids.shape)
    said = []
    bounds = [0, *range(prompt, columns + 1)]
    for start, end in pairwise(bounds):
        phase = PHASES[start > 0]
        began = time.perf_counter()
        logits = model(
            ids[:, start:end], position_ids=places[:, start:end], past_key_values=cache
        ).logits
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)
        into.seconds[phase] += time.perf_counter() - began
        said.append(logits.argmax(-1))
        known = min(end, columns - 1) - start  # the last column has no next token
        if known:
            target = ids[:, start + 1 : start + 1 + known].flatten()
            lines = logits[:, :known].float().flatten(0, 1)
            into.loss[phase] += float(cross_entropy(lines, target, reduction="sum"))
            into.tokens[phase] += target.numel()
    into.said.append(torch.cat(said, 1))


def read_in_turn(
    arms: Mapping[str, tuple[Any, AbstractContextManager[Any] | None]],
    texts: Tensor,
    batch: int,
    prompt: int,
) -> dict[str, Reading]:
    """Lets models read the same texts, batch by batch, in an order that changes.

    Args:
        arms: By name: a model, and a context for its calls.
        texts: `[rows, columns]`; rows beyond the last full batch are left out.
        batch: Rows per batch.
        prompt: Columns that are read at once.
    """
    order, draw = list(arms), random.Random(0)
    for name in order:  # compiles
        with arms[name][1] or nullcontext():
            read(arms[name][0], texts[:batch], prompt, Reading())
    found = {name: Reading() for name in order}
    for rows in texts[: len(texts) // batch * batch].split(batch):
        draw.shuffle(order)
        for name in order:
            with arms[name][1] or nullcontext():
                read(arms[name][0], rows, prompt, found[name])
    return found


def bigram_nll(train: Tensor, texts: Tensor, vocabulary: int) -> float:
    """Mean negative log-likelihood, in nats, of texts `[rows, columns]` by a bigram model.

    Counts of `train [N]`, smoothed by the frequencies of single tokens as suits it best.
    """
    single = torch.bincount(train, minlength=vocabulary).float() + 0.1
    single /= single.sum()
    first, second = texts[:, :-1].flatten(), texts[:, 1:].flatten()
    seen = torch.bincount(train[:-1], minlength=vocabulary).float()[first]
    pairs, counts = (train[:-1] * vocabulary + train[1:]).unique(return_counts=True)
    wanted = first * vocabulary + second
    at = torch.searchsorted(pairs, wanted).clamp(max=len(pairs) - 1)
    together = torch.where(pairs[at] == wanted, counts[at], 0).float()
    return min(
        float(-((together + weight * single[second]) / (seen + weight)).log().mean())
        for weight in (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
    )


class Thresholds:
    """A context in which a rewritten model has other thresholds."""

    def __init__(self, adept: Any, value: float) -> None:
        self.adept, self.value = adept, value
        self.before: tuple[Any, Any] = (None, None)

    def __enter__(self) -> None:
        self.before = self.adept.thresholds, self.adept.prefill_thresholds
        self.adept.thresholds = self.adept.prefill_thresholds = self.value

    def __exit__(self, *_: object) -> None:
        self.adept.thresholds, self.adept.prefill_thresholds = self.before
