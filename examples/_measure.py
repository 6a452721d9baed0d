"""Depths, agreement and seconds: what a quickstart has to show about early exits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


class DepthRecorder(LogitsProcessor):
    """Notes, at every step of `generate`, the layers run for the token about to be chosen.

    These are the layers that its predecessor took in the forward whose logits choose it. Batches
    are padded on the left, so that is the last column.
    """

    def __init__(self, adept: Any) -> None:
        self._adept = adept
        self._columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Leaves the scores as they are."""
        self._columns.append(self._adept.last_depth[:, -1].clone())
        return scores

    @property
    def depths(self) -> Tensor:
        """Layers per generated token, `[rows, tokens]`."""
        return torch.stack(self._columns, dim=1).cpu()


@dataclass(frozen=True)
class Quality:
    """How much of the original's predictions is left on held-out text, at what work."""

    tokens: int
    agreement: float
    loss: float
    original_loss: float
    work: float


def generate(model: Any, inputs: Mapping[str, Tensor], tokens: int, *watch: Any) -> Tensor:
    """Greedily generates exactly `tokens` tokens per row; returns these alone."""
    config = GenerationConfig(
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=model.generation_config.pad_token_id,
        eos_token_id=model.generation_config.eos_token_id,
    )
    out = model.generate(
        **inputs, generation_config=config, logits_processor=LogitsProcessorList(watch)
    )
    return out[:, inputs["input_ids"].shape[1] :]


def same_prefix(left: Tensor, right: Tensor) -> list[int]:
    """Per row, the number of tokens before the two differ."""
    equal = (left == right).long().cumprod(dim=1)
    return equal.sum(dim=1).tolist()


@torch.no_grad()
def measure_quality(original: Any, ee: Any, ids: Tensor) -> Quality:
    """Compares next-token predictions on the same text, `ids: [rows, length + 1]`."""
    ee.adept.stats.reset()
    agree, loss, original_loss = 0, 0.0, 0.0
    for rows in ids.split(4):
        target = rows[:, 1:].flatten()
        base, early = (m(rows[:, :-1]).logits.float().flatten(0, 1) for m in (original, ee))
        agree += int((base.argmax(-1) == early.argmax(-1)).sum())
        original_loss += float(cross_entropy(base, target, reduction="sum"))
        loss += float(cross_entropy(early, target, reduction="sum"))
    stats, count = ee.adept.stats, ids[:, 1:].numel()
    work = stats.needed_token_layers / stats.total_token_layers
    return Quality(count, agree / count, loss / count, original_loss / count, work)


def median_seconds(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    repetitions: int,
    budget: float = 40.0,
) -> dict[str, float]:
    """Times the runs in turn, each once before it counts; returns medians.

    After `budget` seconds no further round begins, but one always counts.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for repetition in range(repetitions + 1):
        if repetition > 1 and time.perf_counter() - begin > budget:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repetition:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}
