"""Which tokens are in the graph's values at one point of a forward, and how they lie."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adept_fx.graph.blocks import SynthesizedKV
from adept_fx.graph.symbols import TokenAxes
from adept_fx.ops.map_state import left_at, mapped
from adept_fx.runtime.rows import Rows, take

if TYPE_CHECKING:
    from adept_fx.runtime.run import Run


class Tokens:
    """The layout of one stage.

    Dense (``index`` is None): all tokens of the call, ``[B, S]``; tokens that have left are kept
    by ``freeze``. Compacted: live tokens only, ``[1, N]``, at the positions ``index``.

    Args:
        run: The forward that this belongs to.
        index: Positions ``b * S + s`` of live tokens, ascending; None for the dense layout.
        active: Dense layout: which tokens go on, ``[B, S]``; None if none has left.
        before: The layout before the exit point; None at the start.
        count: Compacted layout: number of live tokens; entries of ``index`` beyond it repeat the
            last one. None if there are no such entries.
        select: Positions of live tokens in the layout before; None if it stays.
        departed: Positions ``b * S + s`` of tokens whose keys are to be synthesized here.
        departed_select: The same as positions in the layout before.
    """

    def __init__(
        self,
        run: "Run",
        *,
        index: Tensor | None = None,
        count: int | None = None,
        active: Tensor | None = None,
        before: "Tokens | None" = None,
        select: Tensor | None = None,
        departed: Tensor | None = None,
        departed_select: Tensor | None = None,
    ) -> None:
        self.run = run
        self.index = index
        if count is None:
            count = 0 if index is None else len(index)
        self.count = count
        self.active = active
        self.scores: Tensor | None = None  # of a gate that ran with the stage
        self.select = select
        self.departed = departed
        self.departed_select = departed_select
        self._index_before = None if before is None else before.index
        # S if the layout before was the call's own
        self._tokens_before = run.tokens if before is None or before.index is None else None

    @property
    def empty(self) -> bool:
        """Whether no token is live: the next stage need not run."""
        return self.index is not None and self.count == 0

    @property
    def settles(self) -> bool:
        """Whether all tokens of the call left from the dense layout: none is live, none is gone."""
        if not self.empty or self._tokens_before is None or self.departed is None:
            return False
        run = self.run
        whole = len(self.departed) == run.batch * run.tokens
        return whole and run.cache is not None and not run.eager

    @cached_property
    def rows(self) -> Rows:
        """The rows of the live tokens."""
        if self.index is None:
            raise ValueError("the dense layout has no packed rows")
        batch, tokens = self.run.batch, self.run.tokens
        if self.run.settings.compiled:
            # Compiled graphs take any size but 1, and all rows of the cache, which are not copied.
            return Rows.all_of(self.index, self.count, batch, tokens)
        return Rows.of(self.index, batch, tokens)

    @property
    def separable(self) -> bool:
        """Whether rows without a live token may be left out of what is attended to."""
        run = self.run
        return run.cache is None and run.batch > 2 and run.tokens > 1 and not run.kept

    @property
    def cache(self) -> Any:
        """The call's cache; None if it has none."""
        return self.run.cache

    @property
    def kept(self) -> dict[str, tuple[Tensor, ...]]:
        """What the cache returned for slots that later stages read."""
        return self.run.kept

    def gather(self, value: Tensor, axes: tuple[int | None, int | None, int | None, int]) -> Tensor:
        """A value of the layout before, in this layout."""
        if self.select is None:
            return value
        return take(value, TokenAxes(*axes), self.select, self._tokens_before)

    def gather_departed(self, value: Tensor, axes: TokenAxes) -> Tensor:
        """A value of the layout before, of the tokens whose keys are to be synthesized."""
        if self.departed_select is None:
            raise ValueError("no token has left here")
        chosen = self.departed_select
        if self.run.settings.compiled and len(chosen) == 1:
            chosen = chosen.expand(2)  # a size of 1 would be compiled apart
        return take(value, axes, chosen, self._tokens_before)

    def spread(self, state: Tensor) -> Tensor:
        """This layout's states in the layout of the call, ``[B, S, D]``; padding is zero."""
        if self.index is None:
            return state
        batch, tokens, width = self.run.batch, self.run.tokens, state.shape[-1]
        return self.scatter(state.new_zeros(batch, tokens, width), state)

    def scatter(self, whole: Tensor, state: Tensor) -> Tensor:
        """Puts this layout's states over ``whole [B, S, D]``."""
        if self.index is None:
            return state
        if self.empty:
            return whole
        return whole.flatten(0, 1).index_copy(0, self.index, state[0]).view_as(whole)

    def freeze(self, new: Tensor, frozen: Tensor) -> Tensor:
        """Keeps the states of tokens that have left, in the dense layout."""
        if self.active is None:
            return new
        return torch.where(self.active.unsqueeze(-1), new, frozen)

    def map_state(
        self, hidden: Tensor, down: Tensor, up: Tensor, which: int, exits: tuple[int, ...]
    ) -> Tensor:
        """States behind the KV maps of the tokens that have left, in the dense layout."""
        if self.active is None:
            return hidden
        return mapped(hidden, left_at(self.run.depth, exits), down, up, which)

    def left_at(self, exits: tuple[int, ...]) -> Tensor | None:
        """At which exit point each token of the layout before left, ``[B, S, E]``.

        None if no token is to be synthesized here.
        """
        if self.departed is None:
            return None
        depth, index = self.run.depth, self._index_before
        return left_at(depth if index is None else depth.flatten()[index].unsqueeze(0), exits)

    def write(
        self,
        slot: str,
        live: Sequence[Tensor],
        synthesized: Sequence[SynthesizedKV | None],
        shared: bool = False,
    ) -> tuple[Tensor, ...]:
        """Writes a slot of a layer to the cache.

        Args:
            slot: What is written.
            live: Values of the live tokens, in this layout; none if no token runs the layer.
            synthesized: Values of the tokens that have left.
            shared: Keep what the cache returns for a later stage.

        Returns:
            All keys (and values) that the layer may attend to.
        """
        values = tuple(live) if self.index is None else self.assemble(slot, live, synthesized)
        result = self.run.update(slot, values)
        if shared:
            self.kept[slot] = result
        return result

    def assemble(
        self,
        slot: str,
        live: Sequence[Tensor],
        synthesized: Sequence[SynthesizedKV | None],
    ) -> tuple[Tensor, ...]:
        """Puts live and synthesized values together, in the layout of the call."""
        parts: list[tuple[Tensor, Sequence[Tensor]]] = []
        if live and self.index is not None:
            own = [value.narrow(-2, 0, self.count) for value in live]
            parts.append((self.index[: self.count], own))
        for item in synthesized:
            if item is not None and slot in item.values:
                parts.append((item.index, item.values[slot]))
        index = torch.cat([part[0] for part in parts]) if len(parts) > 1 else parts[0][0]
        values = zip(*(part[1] for part in parts), strict=True)
        return tuple(self._whole(index, list(value)) for value in values)

    def _whole(self, index: Tensor, parts: list[Tensor]) -> Tensor:
        """Lays packed values out as ``[B, ..., S, D]``; padding is zero.

        The token axis is the last but one: ``[1, H, N, D]`` keys, ``[1, N, D]`` states.
        """
        batch, tokens = self.run.batch, self.run.tokens
        if batch == 1 and len(parts) == 1 and index.numel() == tokens:
            return parts[0]
        packed = (torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0])[0].movedim(-2, 0)
        if len(parts) > 1 or index.numel() != batch * tokens:
            whole = packed.new_zeros(batch * tokens, *packed.shape[1:])
            packed = whole.index_copy(0, index, packed)
        rows: Tensor = packed.unflatten(0, (batch, tokens))
        return rows.movedim(1, -2)

    def gone(
        self, slots: Sequence[str], synthesized: Sequence[SynthesizedKV | None]
    ) -> tuple[Tensor | None, dict[str, tuple[Tensor, ...]]]:
        """What slots are owed of the tokens that left, whatever exit they left at.

        Returns:
            Their positions ``[G]``, ``G >= 2`` as a size of 1 would be compiled apart, and per
            slot their values ``[1, ..., G, D]``; None and nothing if none left.
        """
        items = [item for item in synthesized if item is not None]
        if not items or not slots:
            return None, {}
        index = torch.cat([item.index for item in items])
        wanted = max(len(index), 2)

        def together(parts: Sequence[Tensor]) -> Tensor:
            whole = torch.cat(list(parts), dim=-2) if len(parts) > 1 else parts[0]
            return whole if whole.shape[-2] == wanted else torch.cat((whole, whole), dim=-2)

        values = {
            slot: tuple(map(together, zip(*(item.values[slot] for item in items), strict=True)))
            for slot in slots
        }
        return index if len(index) == wanted else torch.cat((index, index)), values

    def pick(self, whole: Tensor) -> Tensor:
        """The live tokens of ``whole [B, S, D]``, packed."""
        if self.index is None:
            return whole
        return whole.flatten(0, 1).index_select(0, self.index).unsqueeze(0)

    def to_rows(self, value: Tensor | None, kind: str, axes: TokenAxes, keys: Tensor) -> object:
        """An input of attention, with one row per row of the batch that has a live token."""
        return self.rows.input(value, kind, axes, keys, self.run.tokens)

    def count_stage(self, layers: range) -> None:
        """Counts the token-layers that a stage computes."""
        live = self.run.real_count if self.index is None else self.count
        self.run.executed += live * len(layers)
