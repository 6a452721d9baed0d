"""What a layer costs on this machine, by the number of tokens that run it.

Measured once, when a model is compiled: in a second or two for 200M parameters on two CPU cores.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from adept_fx.graph.blocks import Owed, Stage, Synthesis
from adept_fx.pipeline import Program
from adept_fx.runtime.rows import Rows

_GRID = (2, 4, 8, 16, 32, 64, 128, 256)
# Enough weights that none is in a cache of the processor when it is needed again, as in a forward.
_BYTES = 128 * 2**20
# Seconds. Beyond that, time grows with the tokens.
_LONG = 0.1
_ROUNDS = 5
# What is measured is noisy, and to stay as it is costs nothing.
_WORTHWHILE = 0.97


@dataclass(frozen=True)
class Costs:
    """Seconds of one layer.

    Attributes:
        tokens: Numbers of tokens that were measured, ascending.
        layer: Seconds of a layer's linear maps, for each of them.
        moved: Seconds to lay out what the layer writes to the cache and what attends, if its
            tokens are packed.
        owed: Share of a layer's weights that make its keys and values.
    """

    tokens: tuple[int, ...]
    layer: tuple[float, ...]
    moved: tuple[float, ...]
    owed: float

    def profitable(self, live: int, departed: int, total: int) -> bool:
        """Whether it pays to pack the live tokens.

        Args:
            live: Tokens that go on.
            departed: Tokens whose keys and values are synthesized if the others are packed.
            total: Tokens of the call, padding included: the dense plan runs them all.
        """
        packed = self._at(self.layer, live) + self._at(self.moved, total)
        if departed:
            packed += self.owed * self._at(self.layer, departed)
        return packed < _WORTHWHILE * self._at(self.layer, total)

    def _at(self, seconds: Sequence[float], tokens: int) -> float:
        """Between two measured numbers on a line; beyond the last in proportion to the tokens."""
        place = bisect_left(self.tokens, tokens)
        if place == 0:
            return seconds[0]
        if place == len(self.tokens):
            return seconds[-1] * tokens / self.tokens[-1]
        left, right = self.tokens[place - 1], self.tokens[place]
        share = (tokens - left) / (right - left)
        return seconds[place - 1] * (1.0 - share) + seconds[place] * share


@torch.no_grad()
def measure(program: Program) -> Costs | None:
    """Measures a program's layers; None if they have no linear maps that could be timed.

    Args:
        program: What will run.
    """
    stages = [block for block in program.graph.children() if isinstance(block, Stage)]
    blocks = [block for block in program.graph.children() if isinstance(block, Synthesis)]
    stage = max(stages, key=lambda item: len(item.layers), default=None)
    if stage is None:
        return None
    weights = _weights(stage)
    numbers = sum(weight.numel() for weight in weights)
    if not numbers:
        return None
    chosen = _some(weights)
    share = numbers / len(stage.layers) / sum(weight.numel() for weight in chosen)
    arms: list[Callable[[], object]] = []
    sizes = []
    for tokens in _GRID:
        sizes.append(tokens)
        arms += (_layer(chosen, tokens), _move(stage.owed, stage.layers, chosen[0], tokens))
        if _seconds(arms[-2], chosen[0]) > _LONG:
            break
    best = _best(arms, chosen[0])
    layer = _ascending([share * seconds for seconds in best[::2]])
    moved = _ascending([seconds / len(stage.layers) for seconds in best[1::2]])
    return Costs(tuple(sizes), layer, moved, _owed(blocks, stages))


def _best(arms: Sequence[Callable[[], object]], like: Tensor) -> list[float]:
    """Least seconds of each, taken in turn: a machine's speed drifts."""
    rounds = [[_seconds(arm, like) for arm in arms] for _ in range(_ROUNDS)]
    return [min(found) for found in zip(*rounds, strict=True)]


def _ascending(seconds: Sequence[float]) -> tuple[float, ...]:
    """More tokens never take less time; noise only adds to it."""
    return tuple(min(seconds[at:]) for at in range(len(seconds)))


def _weights(block: Stage | Synthesis) -> list[Tensor]:
    """Matrices, experts as one."""
    found = [source.get() for source in block.sources]
    return [
        weight.flatten(0, -2) if weight.ndim > 2 else weight
        for weight in found
        if weight.ndim >= 2 and weight.is_floating_point()
    ]


def _some(weights: Sequence[Tensor]) -> list[Tensor]:
    size, found = 0, []
    for weight in weights:
        found.append(weight)
        size += weight.numel() * weight.element_size()
        if size >= _BYTES:
            break
    return found


def _owed(blocks: Sequence[Synthesis], stages: Sequence[Stage]) -> float:
    """Share of the layers' weights that make keys and values."""
    first = max(blocks, key=lambda item: len(item.layers), default=None)
    if first is None:
        return 0.0
    own = sum(weight.numel() for weight in _weights(first)) / len(first.layers)
    whole = sum(weight.numel() for stage in stages for weight in _weights(stage))
    return own * sum(len(stage.layers) for stage in stages) / whole


def _layer(weights: Sequence[Tensor], tokens: int) -> Callable[[], object]:
    inputs = {
        weight.shape[1]: torch.randn(
            tokens, weight.shape[1], device=weight.device, dtype=weight.dtype
        )
        for weight in weights
    }
    return lambda: [F.linear(inputs[weight.shape[1]], weight) for weight in weights]


def _move(owed: Sequence[Owed], layers: range, like: Tensor, tokens: int) -> Callable[[], object]:
    """All layers of a stage where half of the tokens are live and the other half left."""
    index = torch.arange(tokens, device=like.device)
    half = tokens // 2
    states = torch.randn(1, half, like.shape[1], device=like.device, dtype=like.dtype)
    values = [
        torch.zeros(tokens, *shape, dtype=dtype, device=like.device)
        for item in owed
        for shape, dtype in zip(item.shapes, item.dtypes, strict=True)
    ]

    def move() -> None:
        rows = Rows.all_of(index[:half], half, 1, tokens)
        for value in values:
            whole = torch.zeros_like(value).index_copy_(0, index[half:], value[half:])
            whole.index_copy(0, index[:half], value[:half])
        for _ in layers:
            wide = states.index_select(1, rows.padded.flatten())
            wide.index_select(1, rows.slot)

    return move


def _seconds(call: Callable[[], object], like: Tensor) -> float:
    began = time.perf_counter()
    call()
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)
    return time.perf_counter() - began
