"""Conversations for the equivalence tests: ragged prompts, chunks, decode steps, gate scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from models import VOCAB
from oracle import Exits, Oracle, assert_cache_equal, assert_close, assert_same

THRESHOLD = 0.5


@dataclass(frozen=True)
class Case:
    """A conversation: everything else follows from it and its seed."""

    lengths: tuple[int, ...]  # real prompt tokens of each row
    side: str = "left"  # where the shorter rows are padded
    extra: int = 0  # columns that are padding in every row
    chunk: int = 0  # prompt columns per forward; 0: all at once
    steps: int = 4  # decode steps, with given tokens
    cache: str = "dynamic"  # "static"; "none": one forward of the prompt
    head: bool = True  # call the model (logits), or its decoder (hidden states)
    explicit: bool = True  # pass mask and positions even if nothing is padding
    leave: float = 0.4  # chance to leave, of a token at an exit
    seed: int = 0

    @property
    def prompt(self) -> int:
        return max(self.lengths) + self.extra

    @property
    def columns(self) -> int:
        return self.prompt + (0 if self.cache == "none" else self.steps)

    def generator(self, salt: int) -> torch.Generator:
        return torch.Generator().manual_seed(1_000 * self.seed + salt)


@dataclass(frozen=True)
class Turn:
    """One forward call of a conversation."""

    ids: Tensor  # [B, S]
    real: Tensor  # [B, S]
    positions: Tensor  # [B, S]
    seen: Tensor  # [B, columns so far], which of them are real
    explicit: bool = True

    def inputs(self, model_type: str) -> dict[str, Tensor]:
        given = {"input_ids": self.ids}
        if self.explicit:
            given["attention_mask"] = self.seen.long()
            if model_type != "bloom":  # which counts by the mask
                given["position_ids"] = self.positions
        return given

    def row(self, row: int, strip: bool) -> Turn:
        """One row alone, with its padding or without."""
        keep, kept = self.real[row], self.seen[row]
        if not strip:
            keep, kept = torch.ones_like(keep), torch.ones_like(kept)

        def pick(x: Tensor, columns: Tensor) -> Tensor:
            return x[row : row + 1, columns]

        ids, positions = pick(self.ids, keep), pick(self.positions, keep)
        return Turn(ids, pick(self.real, keep), positions, pick(self.seen, kept), self.explicit)


@dataclass
class Trace:
    """What a model said: an output per turn, who ran how far, and the cache that remains."""

    outputs: list[Tensor]
    depths: list[Tensor]
    cache: Any


@dataclass(frozen=True)
class Script:
    """A case spelled out: its turns and, per turn, scores [exits, B, S]."""

    case: Case
    turns: list[Turn]
    scores: list[Tensor] = field(default_factory=list)

    @property
    def wants(self) -> list[Tensor]:
        return [scores > THRESHOLD for scores in self.scores]

    def row(self, row: int, strip: bool) -> Script:
        """The same for one row alone; turns in which it says nothing drop out."""
        turns, scores = [], []
        for turn, score in zip(self.turns, self.scores, strict=True):
            alone = turn.row(row, strip)
            if alone.ids.shape[1]:
                keep = turn.real[row] if strip else torch.ones_like(turn.real[row])
                turns.append(alone)
                scores.append(score[:, row : row + 1, keep])
        return Script(self.case, turns, scores)


def script(case: Case, exits: int, out_at: int | None = None) -> Script:
    """Spells out `case` for so many exits; with `out_at`, all leave at the exit of that index."""
    rows, columns = len(case.lengths), case.columns
    real = torch.zeros(rows, columns, dtype=torch.bool)
    real[:, case.prompt :] = True
    for row, length in enumerate(case.lengths):
        start = case.prompt - length if case.side == "left" else 0
        real[row, start : start + length] = True
    ids = torch.randint(0, VOCAB, real.shape, generator=case.generator(1))
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    explicit = case.explicit or not bool(real.all())
    scores = _scores(case, exits, out_at)
    turns, pieces = [], []
    for start, stop in _spans(case):
        part = slice(start, stop)
        turn = Turn(ids[:, part], real[:, part], positions[:, part], real[:, :stop], explicit)
        turns.append(turn)
        pieces.append(scores[:, :, part])
    return Script(case, turns, pieces)


def _spans(case: Case) -> list[tuple[int, int]]:
    width = case.chunk if case.chunk and case.cache != "none" else case.prompt
    spans = [(at, min(at + width, case.prompt)) for at in range(0, case.prompt, width)]
    return spans + [(at, at + 1) for at in range(case.prompt, case.columns)]


def _scores(case: Case, exits: int, out_at: int | None) -> Tensor:
    """Scores [exits, B, columns]: mixed, and in some turns all of one mind."""
    shape = (exits, len(case.lengths), case.columns)
    generator = case.generator(2)
    draw = torch.rand(shape, generator=generator)
    value = torch.rand(shape, generator=generator)
    stay, go = value * 0.5, 0.5 + (value * 0.5).clamp(min=1e-3)
    stay = torch.where(value < 0.1, THRESHOLD, stay)  # exactly at the threshold is not above it
    leaves = draw < case.leave
    moods = torch.rand(case.columns, generator=generator)
    moods[: case.prompt] = moods[0]
    last = torch.randint(0, exits, (), generator=generator)
    index = torch.arange(exits)[:, None, None]
    leaves = leaves & (moods >= 0.15)  # none leaves
    leaves = torch.where(moods > 0.75, index == last, leaves)  # all leave at one exit
    if out_at is not None:
        leaves = (index == out_at).expand(shape)
    return torch.where(leaves, go, stay)


def make_cache(case: Case, model: PreTrainedModel) -> Any:
    if case.cache == "none":
        return None
    if case.cache == "static":
        return StaticCache(config=model.config, max_cache_len=case.columns + 3)
    return DynamicCache(config=model.config)


Around = Callable[[int, Turn], AbstractContextManager[Any]]


@torch.no_grad()
def play(
    model: PreTrainedModel,
    spoken: Script,
    around: Around = lambda index, turn: nullcontext(),
    depth: Callable[[Any], Tensor] | None = None,
) -> Trace:
    """Runs the turns; `around` is entered for each, `depth` reads what it gave afterwards."""
    case = spoken.case
    called = model if case.head else model.get_decoder()
    cache = make_cache(case, model)
    trace = Trace([], [], cache)
    for index, turn in enumerate(spoken.turns):
        inputs = turn.inputs(model.config.model_type)
        with around(index, turn) as entered:
            out = called(**inputs, past_key_values=cache, use_cache=cache is not None)
        trace.outputs.append(out.logits if case.head else out.last_hidden_state)
        if depth is not None:
            trace.depths.append(depth(entered).clone())
    return trace


def play_oracle(model: PreTrainedModel, exits: Sequence[int], spoken: Script) -> Trace:
    """What the masked-dense oracle on the original model says."""
    oracle, wants = Oracle(model, exits), spoken.wants

    def around(index: int, turn: Turn) -> AbstractContextManager[Exits]:
        return oracle.exits_for(wants[index], turn.real)

    return play(model, spoken, around, lambda entered: entered.depth)


def assert_trace_equal(
    got: Trace,
    want: Trace,
    spoken: Script,
    what: str,
    *,
    truth: Trace | None = None,
    bitwise: bool = False,
    layers: int | None = None,
) -> None:
    """Outputs at real tokens, depths where both know them, every layer's cache."""
    for index, turn in enumerate(spoken.turns):
        where = f"{what} turn={index} {'logits' if spoken.case.head else 'hidden'}"
        x, y = got.outputs[index], want.outputs[index]
        assert x.shape == y.shape, f"{where}: shape {tuple(x.shape)}, not {tuple(y.shape)}"
        if bitwise:
            assert_same(x[turn.real], y[turn.real], where)
        else:
            exact = None if truth is None else truth.outputs[index][turn.real]
            assert_close(x[turn.real], y[turn.real], where, exact)
        if got.depths and want.depths:
            assert torch.equal(got.depths[index], want.depths[index]), (
                f"{what} turn={index} depth: {got.depths[index]}, not {want.depths[index]}"
            )
    if want.cache is not None:
        seen, exact = spoken.turns[-1].seen, None if truth is None else truth.cache
        options: dict[str, Any] = {"bitwise": bitwise, "layers": layers}
        assert_cache_equal(got.cache, want.cache, seen, what, truth=exact, **options)


def joined(trace: Trace) -> Trace:
    """All turns as one, so that differently chunked runs compare."""
    depths = [torch.cat(trace.depths, dim=1)] if trace.depths else []
    return replace(trace, outputs=[torch.cat(trace.outputs, dim=1)], depths=depths)


def joined_script(spoken: Script) -> Script:
    real = torch.cat([turn.real for turn in spoken.turns], dim=1)
    return replace(spoken, turns=[replace(spoken.turns[-1], real=real)])
