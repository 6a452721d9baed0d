"""What a compiled stage sees of a forward: tensors, and the cache's layers.

The graph of a stage calls the functions of :mod:`adept_fx.ops.tokens` on the layout of its live
tokens. Run eagerly, that is a :class:`~adept_fx.runtime.tokens.Tokens`, which chooses plans and
reads numbers off tensors. Compiled, it is one of these: nothing in them depends on a tensor's
values, so that sizes stay symbols and one compilation serves any number of tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adept_fx.gates.base import GateInputs
from adept_fx.graph.symbols import TokenAxes
from adept_fx.ops.map_state import left_at, mapped
from adept_fx.runtime.gate_inputs import Place, gate_inputs
from adept_fx.runtime.rows import Rows


class Layout(ABC):
    """What both layouts share.

    Args:
        place: Where the stage is.
        slots: The cache's layer behind each slot; None if the call has no cache.
        cache: The whole cache, for modules that keep recurrent state in it.
        kept: What the cache returned for slots that later stages read.
        visible: Keys that there are; those beyond them are places of a static cache that hold
            nothing yet. None if attention is given a mask that says so.
    """

    gate_state: Mapping[str, Tensor]

    def __init__(
        self,
        place: Place,
        slots: Mapping[str, Any] | None,
        cache: Any,
        kept: dict[str, tuple[Tensor, ...]],
        visible: int | None,
    ) -> None:
        self.place = place
        self.slots = slots
        self.cache = cache
        self.kept = kept
        self.visible = visible

    def write(
        self, slot: str, live: Sequence[Tensor], synthesized: object, shared: bool = False
    ) -> tuple[Tensor, ...]:
        """Writes a slot of a layer; returns all that the layer may attend to."""
        result = values = self.assemble(slot, live, synthesized)
        if self.slots is not None:
            layer = self.slots[slot]
            if slot.startswith("indexer"):
                result = (layer.update_indexer(values[0]),)
            else:
                keys, entries = layer.update(*values)
                result = (keys, entries)
        if self.visible is not None:
            result = tuple(value.narrow(-2, 0, self.visible) for value in result)
        if shared:
            self.kept[slot] = result
        return result

    @abstractmethod
    def assemble(
        self, slot: str, live: Sequence[Tensor], synthesized: object
    ) -> tuple[Tensor, ...]:
        """A slot's values of all tokens, in the layout of the call."""


class DenseLayout(Layout):
    """All tokens of the call, ``[B, S]``.

    Args:
        shared: Arguments of :class:`Layout`.
        active: Which tokens go on, ``[B, S]``; None if none has left.
    """

    index = None

    def __init__(self, *shared: Any, active: Tensor | None = None) -> None:
        super().__init__(*shared)
        self.active = active

    def assemble(
        self, slot: str, live: Sequence[Tensor], synthesized: object
    ) -> tuple[Tensor, ...]:
        """The live values: all tokens have one."""
        return tuple(live)

    def freeze(self, new: Tensor, frozen: Tensor) -> Tensor:
        """Keeps the states of tokens that have left."""
        if self.active is None:
            return new
        return torch.where(self.active.unsqueeze(-1), new, frozen)

    def map_state(
        self, hidden: Tensor, down: Tensor, up: Tensor, which: int, exits: tuple[int, ...]
    ) -> Tensor:
        """States behind the KV maps of the tokens that have left."""
        return mapped(hidden, left_at(self.place.grid, exits), down, up, which)

    def inputs_of_gate(
        self, needs: frozenset[str], hidden: Tensor, features: Sequence[Tensor]
    ) -> GateInputs:
        """Every token of the call, row after row."""
        packed = [
            item.flatten(0, 1) if item.ndim == 3 else item.transpose(1, 2).flatten(0, 1)
            for item in features
        ]
        index = torch.arange(self.place.grid.numel(), device=hidden.device)
        return gate_inputs(self.place, needs, index, hidden.flatten(0, 1), packed)


class PackedLayout(Layout):
    """Live tokens only, ``[1, N]``.

    Args:
        shared: Arguments of :class:`Layout`.
        index: Their positions ``b * S + s``, ``[N]``. The last may be repeated.
        spots: Where they are among the ``R * S`` places of these rows, ``[N]``.
        rows: How they lie in rows: all ``B``, or, without a cache, those that have a live token.
        gone: The same of the tokens that left, ``[G]``; None if there are none.
        owed: Per slot, their values, ``[1, ..., G, D]`` each.
    """

    def __init__(
        self,
        *shared: Any,
        index: Tensor,
        spots: Tensor,
        rows: Rows,
        gone: Tensor | None,
        owed: Mapping[str, tuple[Tensor, ...]],
    ) -> None:
        super().__init__(*shared)
        self.index = index
        self.spots = spots
        self.rows = rows
        self.gone = gone
        self.owed = owed

    def assemble(
        self, slot: str, live: Sequence[Tensor], synthesized: object
    ) -> tuple[Tensor, ...]:
        """Puts live values beside those of tokens that left."""
        count, tokens = self.rows.count, self.place.grid.shape[1]
        found = []
        for at, value in enumerate(live):
            own = value[0].movedim(-2, 0)
            # Padding is zero.
            whole = own.new_zeros(count * tokens, *own.shape[1:])
            if self.gone is not None:
                whole = whole.index_copy(0, self.gone, self.owed[slot][at][0].movedim(-2, 0))
            whole = whole.index_copy(0, self.spots, own)
            found.append(whole.unflatten(0, (count, tokens)).movedim(1, -2))
        return tuple(found)

    def pick(self, whole: Tensor) -> Tensor:
        """The live tokens of ``whole [B, S, D]``."""
        return whole.flatten(0, 1).index_select(0, self.index).unsqueeze(0)

    def freeze(self, new: Tensor, frozen: Tensor) -> Tensor:
        """Every token here is live."""
        return new

    def map_state(
        self, hidden: Tensor, down: Tensor, up: Tensor, which: int, exits: tuple[int, ...]
    ) -> Tensor:
        """Every token here is live."""
        return hidden

    def to_rows(self, value: Tensor | None, kind: str, axes: TokenAxes, keys: Tensor) -> object:
        """An input of attention, in rows."""
        return self.rows.input(value, kind, axes, keys, self.place.grid.shape[1])

    def inputs_of_gate(
        self, needs: frozenset[str], hidden: Tensor, features: Sequence[Tensor]
    ) -> GateInputs:
        """The live tokens."""
        packed = [item[0] if item.ndim == 3 else item[0].transpose(0, 1) for item in features]
        return gate_inputs(self.place, needs, self.index, hidden[0], packed)
