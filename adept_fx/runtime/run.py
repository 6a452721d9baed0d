"""One forward of an exit-aware graph: gates, plans and cache of a single call.

Everything that a call needs lives here and dies with it, so that threads may share a model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from adept_fx.gates.base import Gate
from adept_fx.runtime.costs import Costs
from adept_fx.runtime.drafts import Drafts
from adept_fx.runtime.gate_inputs import Place, collect
from adept_fx.runtime.plan import bucket, profitable
from adept_fx.runtime.rows import share_row
from adept_fx.runtime.scores import check_scores
from adept_fx.runtime.tokens import Tokens
from adept_fx.runtime.watch import Watch


@dataclass(frozen=True)
class Settings:
    """What a call takes from the model's handle when it starts.

    Attributes:
        exits: Exit points, in layers.
        gates: One per exit point; empty when exits are switched off.
        thresholds: One per exit point, for this call's phase.
        plan: ``"auto"``, ``"dense"`` or ``"compact"``.
        num_layers: Layers of the decoder.
        logits: Maps exit states ``[N, D]`` and the index of their exit point to logits ``[N, V]``,
            for gates that ask for them.
        draft: Maps exit states ``[N, D]``, entries of the vocabulary ``[N, k]`` and the index of
            their exit point to the logits of those.
        adapters: Exit adapters, one per exit point; empty if there are none.
        compiled: Whether the stages are compiled.
        costs: What a layer costs here; None if that was not measured.
        watch: Looks on; None if nobody does.
        by_row: Whether gates are asked about the pooled tokens alone.
    """

    exits: tuple[int, ...]
    gates: tuple[Gate, ...]
    thresholds: tuple[float, ...]
    plan: str
    num_layers: int
    logits: Callable[..., Tensor]
    draft: Callable[..., Tensor]
    adapters: tuple[nn.Module, ...] = ()
    compiled: bool = False
    costs: Costs | None = None
    watch: Watch | None = None
    by_row: bool = False

    def needs(self, name: str) -> bool:
        """Whether a gate asks for an input."""
        return any(name in gate.needs for gate in self.gates)

    @property
    def may_exit(self) -> bool:
        """Whether any token may leave."""
        return bool(self.gates) and any(threshold < 1.0 for threshold in self.thresholds)


class Run:
    """The state of one forward.

    Args:
        settings: The handle's settings.
        shape: ``(B, S)`` of the call.
        real: Tokens that are not padding, ``[B, S]``; None if all are real.
        cache: The caller's cache; None if the call has none.
        device: Where the tokens live.
        packable: Whether every mask of the call can be laid out row by row: masks of kernels
            other than SDPA's and the model's own (2-D masks, block masks) cannot.
        pooled: Tokens that the call's result depends on, ``[B, S]``: a row is done once they have
            left. None if every token counts.
    """

    def __init__(
        self,
        settings: Settings,
        shape: tuple[int, int],
        real: Tensor | None,
        cache: Any,
        device: torch.device,
        packable: bool = True,
        pooled: Tensor | None = None,
    ) -> None:
        self.settings = settings
        self.batch, self.tokens = shape
        self.real = real
        self.cache = cache
        self.packable = packable
        self.phase = "prefill" if self.tokens > 1 else "decode"
        self.depth = torch.full(shape, settings.num_layers, dtype=torch.long, device=device)
        if real is not None:
            self.depth = self.depth * real
        self.seen = [0] * len(settings.exits)
        self.exited = [0] * len(settings.exits)
        self.executed = 0
        self.kept: dict[str, tuple[Tensor, ...]] = {}
        self.visible: int | None = None
        self.positions: Tensor | None = None  # [B, S], if a gate asks for them
        self.drafts = Drafts()
        self.eager = False  # a form of call too rare to compile its stages for
        self.settled = False  # what skipped layers are owed has been written
        self._departed: list[Tensor] = []
        self._pooled = None
        if pooled is not None:
            counts = pooled if real is None else pooled & real
            # Padding never leaves: a row that pools nothing else is never done.
            self._pooled = counts | ~counts.any(1, keepdim=True)

    @property
    def asks_pooled(self) -> bool:
        """Whether gates are asked about the pooled tokens alone."""
        return self.settings.by_row and self._pooled is not None

    @cached_property
    def real_count(self) -> int:
        """Tokens that are not padding."""
        return self.batch * self.tokens if self.real is None else int(self.real.sum())

    def enter(self, inputs_embeds: Tensor) -> Tokens:
        """All tokens in the layout of the call; compiled, without padding where that pays."""
        if not self.settings.compiled or self.real is None:
            return Tokens(self)
        if not self.packable or not self.real_count:
            return Tokens(self)
        if not self._pays(self.real_count, 0):
            return Tokens(self)
        index = self._padded(self.real.flatten().nonzero().squeeze(1))
        return Tokens(self, index=index, count=self.real_count, select=index)

    def _padded(self, index: Tensor) -> Tensor:
        """Repeats the last of the packed tokens where a compiled graph wants more."""
        count = len(index)
        wanted = bucket(count, index.device) if self.settings.compiled else count
        return index if wanted == count else torch.cat((index, index[-1:].expand(wanted - count)))

    def _pays(self, live: int, departed: int) -> bool:
        """Whether to pack the live tokens out of the call's layout."""
        plan, costs = self.settings.plan, self.settings.costs
        total = self.batch * self.tokens
        if plan != "auto" or not live or live == total:
            return plan == "compact" or (plan == "auto" and not live)
        if costs is not None:
            return costs.profitable(live, departed, total)
        return profitable(live, total)

    def update(self, slot: str, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Writes a layer's new keys and values; returns all that it may attend to."""
        if self.cache is None:
            return values
        kind, _, layer = slot.rpartition("_")
        if kind == "indexer":
            return (self.cache.update_indexer(values[0], int(layer)),)
        keys, entries = self.cache.update(*values, int(layer))
        return keys, entries

    def decide(
        self, tokens: Tokens, exit_index: int, hidden: Tensor, features: Sequence[Tensor]
    ) -> Tokens:
        """Runs an exit point's gate and lays out the tokens that go on."""
        if not self.settings.gates:
            return Tokens(
                self,
                index=tokens.index,
                count=tokens.count,
                before=tokens,
                active=tokens.active,
            )
        live = self._live(tokens)
        total = self.batch * self.tokens
        count = total if live is None else live.numel()
        asked = self._asked(live) if self.asks_pooled else None
        leave = self._leaving(tokens, exit_index, hidden, features, live, asked)
        leaving = 0 if leave is None else int(leave.sum())
        self.seen[exit_index] += count if asked is None else len(asked)
        if asked is not None and leave is not None:
            leave = asked.new_zeros(count, dtype=torch.bool).index_copy(0, asked, leave)
        self.exited[exit_index] += leaving
        stay = None
        if leaving and leave is not None:
            everything = torch.arange(total, device=hidden.device) if live is None else live
            stay = self._going_on(everything, ~leave)
            self.depth.view(-1)[everything[~stay]] = self.settings.exits[exit_index]
            self._departed.append(everything[leave])
            live = everything[stay]
            count = live.numel()
        if tokens.index is not None:
            return self._narrow(tokens, leave, stay)
        return self._from_dense(tokens, live, count)

    def _going_on(self, live: Tensor, stay: Tensor) -> Tensor:
        """Without the tokens of rows that are done, ``[N]`` bool."""
        if self._pooled is None:
            return stay
        waiting = live[stay & self._pooled.flatten()[live]]
        return stay & self._share_row(live, waiting)

    def _share_row(self, positions: Tensor, others: Tensor) -> Tensor:
        return share_row(positions, others, self.batch, self.tokens)

    def _live(self, tokens: Tokens) -> Tensor | None:
        """Positions of live tokens; None if they are all tokens of the call."""
        if tokens.index is not None:
            return tokens.index[: tokens.count]
        mask = tokens.active if tokens.active is not None else self.real
        return None if mask is None else mask.flatten().nonzero().squeeze(1)

    def _asked(self, live: Tensor | None) -> Tensor:
        """Which of the live tokens the gates are asked about, by their numbers ``[M]``."""
        pooled = self._pooled.flatten() if self._pooled is not None else self.depth.flatten() > 0
        return (pooled if live is None else pooled[live]).nonzero().squeeze(1)

    def _leaving(
        self,
        tokens: Tokens,
        exit_index: int,
        hidden: Tensor,
        features: Sequence[Tensor],
        live: Tensor | None,
        asked: Tensor | None,
    ) -> Tensor | None:
        """Which live tokens leave, or of those asked about: ``[N]``; None if none can."""
        if tokens.empty and exit_index > 0:
            return None
        gate = self.settings.gates[exit_index]
        if tokens.scores is not None:
            live_count = self.batch * self.tokens if live is None else live.numel()
            scores = check_scores(_own(tokens.scores, tokens, live), live_count, gate)
        else:
            inputs = collect(self, gate, tokens, exit_index, hidden, features, live, asked)
            scores = check_scores(gate(inputs), len(inputs.hidden), gate)
        if self.settings.watch is not None:
            states, positions = self._live_states(tokens, hidden, live)
            if asked is not None:
                states, positions = states[asked], positions[asked]
            logits = partial(self.settings.logits, exit_index=exit_index)
            self.settings.watch.see(positions, scores, states, logits)
        threshold = self.settings.thresholds[exit_index]
        # Softmax scores reach exactly 1.0 and a gate may overshoot: 1.0 means never.
        return None if threshold >= 1.0 else scores.float() > threshold

    def _live_states(
        self, tokens: Tokens, hidden: Tensor, live: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """States ``[N, D]`` and positions ``[N]`` of live tokens."""
        if tokens.index is not None:
            return hidden[0, : tokens.count], tokens.index[: tokens.count]
        states = hidden.flatten(0, 1)
        if live is None:
            return states, torch.arange(len(states), device=hidden.device)
        return states[live], live

    def adapt(self, hidden: Tensor) -> Tensor:
        """Puts states of tokens that left, among all ``[B, S, D]``, through their exit adapters."""
        for index, adapter in enumerate(self.settings.adapters):
            if not self.exited[index]:
                continue
            left = (self.depth == self.settings.exits[index]).flatten().nonzero().squeeze(1)
            if len(left) == self.depth.numel():
                return adapter(hidden)  # type: ignore[no-any-return]
            states = hidden.flatten(0, 1)
            hidden = states.index_copy(0, left, adapter(states[left])).view_as(hidden)
        return hidden

    def place(self, exit_index: int) -> Place:
        """Where the gate of an exit point is."""
        return Place(self.depth, exit_index, len(self.settings.exits), self.phase)

    def _narrow(self, tokens: Tokens, leave: Tensor | None, stay: Tensor | None) -> Tokens:
        """A packed layout stays packed."""
        if leave is None or stay is None or tokens.index is None:
            return Tokens(self, index=tokens.index, count=tokens.count, before=tokens)
        going_on, gone = stay.nonzero().squeeze(1), leave.nonzero().squeeze(1)
        count, kept = len(going_on), self._padded(going_on)
        index = tokens.index[kept]
        if self.cache is None:
            gone = gone[self._share_row(tokens.index[gone], index)]  # nobody else reads their keys
        return Tokens(
            self,
            index=index,
            count=count,
            before=tokens,
            select=kept,
            departed=tokens.index[gone] if gone.numel() else None,
            departed_select=gone,
        )

    def _from_dense(self, tokens: Tokens, live: Tensor | None, count: int) -> Tokens:
        """Stays dense, or packs the live tokens, whatever is cheaper."""
        total = self.batch * self.tokens
        departed = sum(map(len, self._departed))
        if not self._pays(count, departed) or not (self.packable or count == 0):
            return Tokens(self, before=tokens, active=self._active(tokens, live))
        device = self.depth.device
        index = torch.arange(total, device=device) if live is None else live
        gone = torch.cat(self._departed).sort().values if self._departed else None
        if self.cache is None:
            if gone is not None:
                gone = gone[self._share_row(gone, index)]
                gone = gone if gone.numel() else None
        elif gone is None and not count:
            # Nothing but padding: one pad gives the cache entries of this call their shape.
            gone = torch.zeros(1, dtype=torch.long, device=device)
        index = self._padded(index)
        return Tokens(
            self,
            index=index,
            count=count,
            before=tokens,
            select=index,
            departed=gone,
            departed_select=gone,
        )

    def _active(self, tokens: Tokens, live: Tensor | None) -> Tensor | None:
        if not self._departed:
            return None
        if live is None:
            return tokens.active
        mask = torch.zeros(self.batch * self.tokens, dtype=torch.bool, device=live.device)
        return mask.index_fill(0, live, True).view(self.batch, self.tokens)


def _own(scores: Tensor, tokens: Tokens, live: Tensor | None) -> Tensor:
    """Of the scores of all tokens that a stage ran, those of live tokens."""
    if tokens.index is not None:
        return scores[: tokens.count]
    return scores if live is None else scores[live]
