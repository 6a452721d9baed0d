"""The submodules of an exit-aware graph.

Each holds a plain ``fx.GraphModule`` and the places where the model keeps the tensors that it
needs. None owns a parameter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn

from adept_fx.capture import TensorRef
from adept_fx.graph.symbols import TokenAxes
from adept_fx.ops.mixer import Mixer


class Block(nn.Module):
    """A part of the model: tensors in, tensors out.

    Args:
        graph: The part's graph; its last inputs are the model's tensors.
        sources: Where to find those, in order.
    """

    def __init__(self, graph: fx.GraphModule, sources: Sequence[TensorRef]) -> None:
        super().__init__()
        self.graph = graph
        self.sources = list(sources)
        self._compiled: list[Any] = []  # in a list: it must not become a child

    def forward(self, *inputs: Any) -> Any:
        """Runs the graph on ``inputs`` and the model's tensors as they are now."""
        if self._compiled:
            return self._compiled[0](*inputs, *[source.get() for source in self.sources])
        return self.run_graph(*inputs)

    def run_graph(self, *inputs: Any) -> Any:
        """The same, without compilation."""
        return self.graph(*inputs, *[source.get() for source in self.sources])

    @property
    def compiled(self) -> bool:
        """Whether calls run a compiled graph."""
        return bool(self._compiled)

    def use(self, compiled: Any) -> None:
        """Makes further calls run a compiled form of the graph."""
        self._compiled = [compiled]


@dataclass(frozen=True)
class Owed:
    """What a stage must write to the cache even when none of its layers runs.

    Attributes:
        slot: What is written (see :mod:`adept_fx.graph.writes`).
        mixer: The module to run, if the slot holds recurrent state.
        inputs: Its inputs from before the layers, as positions among the stage's inputs.
        shapes: Shape of each value for one token: ``(H, D)`` of keys, ``(D,)`` of states.
        dtypes: What they are in.
    """

    slot: str
    mixer: "MixerRegion | None" = None
    inputs: tuple[int, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()


class Stage(Block):
    """The layers between two exit points.

    If no token is live, no layer runs: what was synthesized at the exits before goes to the cache,
    and that is all.

    Args:
        graph: Graph of the layers.
        sources: Their parameters.
        layers: Which layers these are.
        outputs: Number of values that the graph returns.
        owed: What the layers write to the cache.
        synthesized: Number of KV blocks before the stage; what they return are its last inputs.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        sources: Sequence[TensorRef],
        layers: range,
        outputs: int,
        owed: Sequence[Owed] = (),
        synthesized: int = 0,
    ) -> None:
        super().__init__(graph, sources)
        self.layers = layers
        self.outputs = outputs
        self.owed = list(owed)
        self.synthesized = synthesized

    def forward(self, tokens: Any, hidden: Tensor, *inputs: Any) -> Any:
        """Returns the state after the stage (and gate features), in the layout of ``tokens``."""
        tokens.count_stage(self.layers)
        if tokens.empty:
            # Without a cache nobody will read what the layers would have written.
            if tokens.cache is not None and not tokens.run.settled:
                (self._compiled[0].pay if self._compiled else self.pay)(tokens, inputs)
            return hidden if self.outputs == 1 else (hidden,) * self.outputs
        if self._compiled and not tokens.run.eager:
            return self._compiled[0](tokens, hidden, inputs)
        return self.run_graph(tokens, hidden, *inputs)

    def pay(self, tokens: Any, inputs: Sequence[Any]) -> None:
        """Writes to the cache what was synthesized for tokens that skip these layers."""
        synthesized = [item for item in inputs if isinstance(item, SynthesizedKV)]
        for owed in self.owed:
            if owed.mixer is None:
                tokens.write(owed.slot, (), synthesized)
            else:
                owed.mixer.update(tokens, synthesized, [inputs[at] for at in owed.inputs])

    def extra_repr(self) -> str:
        """Which layers the stage holds."""
        return f"layers {self.layers.start}..{self.layers.stop - 1}"


@dataclass(frozen=True)
class SynthesizedKV:
    """Keys and values (and the like) of tokens that left at one exit point.

    Attributes:
        index: Positions ``b * S + s`` of the tokens, ``[M]``.
        values: Per slot of a skipped layer, what it writes: key ``[1, H, M, Dk]`` and value
            ``[1, H, M, Dv]``, an index key ``[1, M, D]``, a mixer's input ``[1, M, D]``.
    """

    index: Tensor
    values: dict[str, tuple[Tensor, ...]]


class Synthesis(Block):
    """Keys and values of all skipped layers at once, from the state at an exit point.

    Args:
        graph: Maps ``hidden [1, M, D]`` and prologue values to what each slot is owed.
        sources: The layers' norms and projections.
        layers: The skipped layers.
        axes: Token axes of each input.
        slots: Number of values of each slot, in the order of the graph's outputs.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        sources: Sequence[TensorRef],
        layers: range,
        axes: Sequence[TokenAxes],
        slots: dict[str, int],
    ) -> None:
        super().__init__(graph, sources)
        self.layers = layers
        self.axes = list(axes)
        self.slots = dict(slots)

    def forward(self, tokens: Any, *inputs: Tensor) -> SynthesizedKV | None:
        """Returns what the tokens that leave here owe the cache; None if it is nothing."""
        if tokens.departed is None:
            return None
        if self._compiled and self._compiled[0].settle(tokens, inputs):
            tokens.run.settled = True
            return None
        leaving = [
            tokens.gather_departed(item, axes) if axes else item
            for item, axes in zip(inputs, self.axes, strict=True)
        ]
        count = len(tokens.departed)
        found = super().forward(*leaving)
        filled = bool(found) and found[0].shape[-2] != count
        flat = iter(_first(found, count) if filled else found)
        values = {slot: tuple(islice(flat, count)) for slot, count in self.slots.items()}
        return SynthesizedKV(tokens.departed, values)

    def extra_repr(self) -> str:
        """Which layers the block fills."""
        return f"layers {self.layers.start}..{self.layers.stop - 1}"


def _first(values: Sequence[Tensor], count: int) -> list[Tensor]:
    """Without the tokens that are there to fill up a size."""
    return [value.narrow(-2, 0, count) for value in values]


class AttentionRegion(nn.Module):
    """A layer's attention, from the cache to its output.

    In the compacted layout, queries are padded per row, rows without a live token are dropped,
    and the outputs are packed again.

    Args:
        graph: The region's graph.
        kinds: Per input: ``"cached"`` (all keys or values of a cache layer, ``[R, H, T, D]``),
            ``"live"`` (in the stage's layout), ``"call"`` (in the layout of the call: masks,
            position biases) or ``"plain"`` (no token axes).
        axes: Token axes of the inputs.
        output: Token axes of the outputs.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        kinds: Sequence[str],
        axes: Sequence[TokenAxes],
        output: Sequence[TokenAxes],
    ) -> None:
        super().__init__()
        self.graph = graph
        self.kinds = list(kinds)
        self.axes = list(axes)
        self.output = list(output)

    def forward(self, tokens: Any, *inputs: Tensor | None) -> Any:
        """Attends; the first input is cached."""
        if tokens.index is None:
            return self.graph(*inputs)
        rows = tokens.rows
        padded = [
            tokens.to_rows(item, kind, axes, inputs[0])
            for item, kind, axes in zip(inputs, self.kinds, self.axes, strict=True)
        ]
        output = self.graph(*padded)
        if len(self.output) == 1:
            return rows.pack(output, self.output[0])
        return tuple(rows.pack(item, axes) for item, axes in zip(output, self.output, strict=True))


class MixerRegion(nn.Module):
    """A module with recurrent state, on all tokens of the call in their order.

    Args:
        mixer: The module's recorded call.
        slot: The name of its state.
        streams: Per input of the call, whether it comes token by token from the layers (the
            others were computed before them).
    """

    def __init__(self, mixer: Mixer, slot: str, streams: Sequence[bool]) -> None:
        super().__init__()
        self.mixer = mixer
        self.slot = slot
        self.streams = tuple(streams)

    def forward(
        self, tokens: Any, synthesized: Sequence[SynthesizedKV | None], *inputs: Tensor | None
    ) -> Tensor:
        """Returns the output in the layout of ``tokens``; stream inputs come first."""
        count = sum(self.streams)
        if tokens.index is None:
            return self._run(tokens, inputs[:count], inputs[count:])
        whole = tokens.assemble(self.slot, inputs[:count], synthesized)
        output: Tensor = tokens.pick(self._run(tokens, whole, inputs[count:]))
        return output

    def update(
        self,
        tokens: Any,
        synthesized: Sequence[SynthesizedKV | None],
        others: Sequence[Tensor | None],
    ) -> None:
        """Updates the state where no token runs the layer."""
        self._run(tokens, tokens.assemble(self.slot, (), synthesized), others)

    def _run(
        self, tokens: Any, streams: Sequence[Tensor | None], others: Sequence[Tensor | None]
    ) -> Tensor:
        first, second = iter(streams), iter(others)
        ordered = [next(first) if stream else next(second) for stream in self.streams]
        output: Tensor = self.mixer(tokens.cache, ordered)
        return output
