"""Runs stages through compiled functions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from adept_fx.gates.base import Gate
from adept_fx.graph.blocks import Stage, SynthesizedKV
from adept_fx.lower.cache import Slots
from adept_fx.lower.forms import compiled, plain
from adept_fx.lower.gate import fuses, state_of
from adept_fx.lower.graph import lower, shares, slot_names, with_gate, writing
from adept_fx.lower.layouts import DenseLayout, PackedLayout
from adept_fx.lower.share import gate_kind, signature
from adept_fx.runtime.rows import Rows, spots

_Owed = dict[str, tuple[Tensor, ...]]


class Functions:
    """All compiled functions of a program's stages: one per graph and form of call.

    Equal stages share them. Each form has code of its own, so that a call never looks through the
    guards of another form.

    Args:
        options: Arguments of ``torch.compile``.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._numbers: dict[Any, int] = {}
        self._graphs: dict[int, fx.GraphModule] = {}
        self._made: dict[Any, Callable[..., Any]] = {}

    def add(self, graph: fx.GraphModule) -> int:
        """Takes a lowered stage; returns the number of the graph that stands for it."""
        known = signature(graph)
        number = self._numbers.setdefault(id(graph) if known is None else known, len(self._numbers))
        self._graphs.setdefault(number, graph)
        return number

    def writer(self, names: tuple[str, ...], form: Any) -> Callable[..., Any]:
        """The function that writes values to slots of these names."""
        return self._compiled(("write", names, form), lambda: writing(names))

    def get(self, key: int, form: Any, gate: Gate | None) -> Callable[..., Any]:
        """The function for a form of call; ``gate`` is computed behind the stage."""
        place = (key, form, None if gate is None else gate_kind(gate))
        return self._compiled(place, lambda: with_gate(self._graphs[key], gate))

    def _compiled(self, place: Any, graph: Callable[[], fx.GraphModule]) -> Callable[..., Any]:
        if place not in self._made:
            self._made[place] = compiled(graph(), self._options)
        return self._made[place]


class CompiledStage:
    """Takes the place of a stage's graph.

    Args:
        stage: The stage.
        index: Which one it is; the exit point behind it has the same number.
        functions: Where its compiled functions are.
    """

    def __init__(self, stage: Stage, index: int, functions: Functions) -> None:
        self.stage = stage
        self.index = index
        self.functions = functions
        self.names = slot_names(stage)
        self.slots = Slots(self.names)
        # Recurrent modules run on all rows, and who reads keys of another stage wants all of them.
        self._separable = not any(item.mixer is not None for item in stage.owed) and not shares(
            stage
        )
        self._keys = {
            frozen: functions.add(lower(stage, freeze=frozen)) for frozen in (False, True)
        }

    def __call__(self, tokens: Any, hidden: Tensor, inputs: Sequence[Any]) -> Any:
        """As ``Stage.forward``, where a token is live."""
        end = len(inputs) - self.stage.synthesized
        layout = self._layout(tokens, inputs[end:])
        gate = self._gate(tokens)
        key = self._keys[tokens.index is None and tokens.active is not None]
        given = [plain(hidden), *map(plain, inputs[:end])]
        form = (*self._form(tokens, layout), *(item is None for item in given))
        function = self.functions.get(key, form, gate)
        sources = [source.get() for source in self.stage.sources]
        if gate is None:
            return function(layout, *given, *sources)
        layout.gate_state = state_of(gate)
        *outputs, tokens.scores = function(layout, *given, *sources)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def pay(self, tokens: Any, inputs: Sequence[Any]) -> None:
        """As ``Stage.pay``."""
        owed = self.stage.owed
        if any(item.mixer is not None for item in owed):
            self.stage.pay(tokens, inputs)
            return
        end = len(inputs) - self.stage.synthesized
        values = [v for item in owed for v in tokens.assemble(item.slot, (), inputs[end:])]
        layout = DenseLayout(*self._shared(tokens, visible=None))
        form = (tokens.run.batch == 1, tokens.run.tokens == 1, Slots.state(layout.slots))
        names = tuple(self.names[item.slot] for item in owed)
        self.functions.writer(names, form)(layout, *map(plain, values))

    def _gate(self, tokens: Any) -> Gate | None:
        gates = tokens.run.settings.gates
        if tokens.run.asks_pooled:
            return None  # of all tokens it would compute scores that few of are read
        gate = gates[self.index] if self.index < len(gates) else None
        return gate if gate is not None and fuses(gate) else None

    def _shared(self, tokens: Any, visible: int | None) -> tuple[Any, ...]:
        run = tokens.run
        return run.place(self.index), self.slots.of(run.cache), run.cache, run.kept, visible

    def _layout(
        self, tokens: Any, synthesized: Sequence[SynthesizedKV | None]
    ) -> DenseLayout | PackedLayout:
        shared = self._shared(tokens, tokens.run.visible)
        if tokens.index is None:
            return DenseLayout(*shared, active=plain(tokens.active))
        slots = [owed.slot for owed in self.stage.owed]
        gone, owed = tokens.gone(slots, synthesized)
        rows, index = tokens.rows, tokens.index
        if self._separable and tokens.separable:
            run = tokens.run
            rows, number = Rows.rows_of(index, tokens.count, run.batch, run.tokens)
            index = spots(index, number, run.tokens)
            gone, owed = _of_rows(gone, owed, number, run.tokens)
        named = {self.names[slot]: tuple(map(plain, values)) for slot, values in owed.items()}
        return PackedLayout(
            *shared,
            index=plain(tokens.index),
            spots=plain(index),
            rows=rows.each(plain),
            gone=plain(gone),
            owed=named,
        )

    def _form(self, tokens: Any, layout: DenseLayout | PackedLayout) -> tuple[Any, ...]:
        """What sizes, types and None decide in a compiled function."""
        run = tokens.run
        sizes = (run.batch == 1, run.tokens == 1, run.visible is None)
        state = Slots.state(layout.slots)
        if isinstance(layout, DenseLayout):
            return ("dense", *sizes, state)
        return ("packed", *sizes, state, layout.gone is None)


def _of_rows(
    gone: Tensor | None, owed: _Owed, number: Tensor, tokens: int
) -> tuple[Tensor | None, _Owed]:
    """What is owed of tokens that left, of the rows that have a number."""
    if gone is None:
        return None, {}
    kept = (number[torch.div(gone, tokens, rounding_mode="floor")] >= 0).nonzero().squeeze(1)
    if not len(kept):
        return None, {}
    if len(kept) == 1:
        kept = kept.expand(2)  # a size of 1 would be compiled apart
    chosen = {k: tuple(v.index_select(-2, kept) for v in values) for k, values in owed.items()}
    return spots(gone[kept], number, tokens), chosen
