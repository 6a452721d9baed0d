"""What a case would take if time followed the work alone: FLOPs in prefill, bytes in decode.

Linear layers count two FLOPs per parameter and token, attention four per query, visible key and
element of a head, on both sides. In decode every weight that any row needs is read once, and so
are the keys and values that a layer attends to. What a token that leaves still owes, the keys and
values of the layers that it skips, is counted as executed. Mixtures of experts are counted as if
every expert ran, on both sides.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adept_fx.bench.cases import Case
from adept_fx.report.explanation import Explanation


@dataclass(frozen=True)
class Work:
    """FLOPs (prefill) or bytes (decode) of one call."""

    base: float
    executed: float

    @property
    def share(self) -> float:
        """Executed work as a share of the base's."""
        return self.executed / self.base


def work(case: Case, found: Explanation, config: Any, dtype: torch.dtype, head: int) -> Work:
    """Counts the work of a case.

    Args:
        case: The case.
        found: What the model was rewritten into.
        config: The model's config.
        dtype: Dtype of weights and cache.
        head: Parameters of the head.
    """
    if case.phase == "prefill":
        return _flops(case, found, config, head)
    return _bytes(case, found, dtype, head)


def _layers(found: Explanation) -> list[int]:
    return [layer.parameters for layer in found.layers]


def _skipped(found: Explanation, layer: int) -> int:
    """Parameters that a token does not run if it leaves after ``layer`` layers."""
    return next((item.skipped_parameters for item in found.exits if item.after == layer), 0)


def _flops(case: Case, found: Explanation, config: Any, head: int) -> Work:
    tokens = sum(case.lengths())
    layers = _layers(found)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    linear, last = 2.0 * sum(layers), 2.0 * head * case.batch
    seen = _visible(case)
    attention = 4.0 * width * float(seen.sum())
    padded = case.batch * case.prompt
    # The base computes padding; attention is counted as visible keys on both sides.
    base = linear * padded + attention * len(layers) + last
    out = case.leaving()
    saved = 2.0 * _skipped(found, case.exit) * int(out.sum())
    unasked = 4.0 * width * float(seen[out].sum()) * (len(layers) - case.exit)
    executed = linear * tokens + attention * len(layers) + last - saved - unasked
    return Work(base, executed)


def _visible(case: Case) -> Tensor:
    """Keys that each token of a prompt attends to, ``[B, S]``; 0 for padding."""
    mask = case.mask()
    if mask is None:
        mask = torch.ones(case.batch, case.prompt, dtype=torch.long)
    return mask.cumsum(1) * mask


def _bytes(case: Case, found: Explanation, dtype: torch.dtype, head: int) -> Work:
    layers = _layers(found)
    per_key = sum(
        layer.key[0] * layer.key[1] + layer.value[0] * layer.value[1]
        for layer in found.layers
        if layer.key and layer.value
    ) / max(len(layers), 1)
    keys = float(sum(case.lengths()) + case.batch)
    base = sum(layers) + head + per_key * keys * len(layers)
    out = case.leaving()
    skipped = _skipped(found, case.exit) if out.all() else 0
    gone = torch.tensor(case.lengths())[out[:, 0]] + 1
    unread = per_key * float(gone.sum()) * (len(layers) - case.exit)
    executed = base - skipped - unread
    return Work(base * dtype.itemsize, executed * dtype.itemsize)
