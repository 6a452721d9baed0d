"""The submodules of an exit-aware graph.

Each holds a plain ``fx.GraphModule`` and the places where the model keeps the tensors that it
needs. None owns a parameter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from adept_fx.capture import TensorRef
from adept_fx.graph.symbols import TokenAxes


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
        self._compiled: list[Callable[..., Any]] = []  # in a list: it must not become a child

    def forward(self, *inputs: Any) -> Any:
        """Runs the graph on ``inputs`` and the model's tensors as they are now."""
        run = self._compiled[0] if self._compiled else self.graph
        return run(*inputs, *[source.get() for source in self.sources])

    def compile_graph(self, options: dict[str, Any]) -> None:
        """Makes further calls run the graph through ``torch.compile(**options)``."""
        self._compiled = [torch.compile(self.graph, **options)]


class Stage(Block):
    """The layers between two exit points.

    If no token is live, no layer runs: keys and values synthesized at the exits before go to the
    cache, and that is all.

    Args:
        graph: Graph of the layers.
        sources: Their parameters.
        layers: Which layers these are.
        outputs: Number of values that the graph returns.
    """

    def __init__(
        self, graph: fx.GraphModule, sources: Sequence[TensorRef], layers: range, outputs: int
    ) -> None:
        super().__init__(graph, sources)
        self.layers = layers
        self.outputs = outputs

    def forward(self, tokens: Any, hidden: Tensor, *inputs: Any) -> Any:
        """Returns the state after the stage (and gate features), in the layout of ``tokens``."""
        tokens.count_stage(self.layers)
        if tokens.empty:
            synthesized = [item for item in inputs if isinstance(item, SynthesizedKV)]
            for layer in self.layers:
                tokens.write_skipped(layer, synthesized)
            return hidden if self.outputs == 1 else (hidden,) * self.outputs
        return super().forward(tokens, hidden, *inputs)

    def extra_repr(self) -> str:
        """Which layers the stage holds."""
        return f"layers {self.layers.start}..{self.layers.stop - 1}"


@dataclass(frozen=True)
class SynthesizedKV:
    """Keys and values of tokens that left at one exit point.

    Attributes:
        index: Positions ``b * S + s`` of the tokens, ``[M]``.
        layers: Per skipped layer, key ``[1, H, M, Dk]`` and value ``[1, H, M, Dv]``.
    """

    index: Tensor
    layers: dict[int, tuple[Tensor, Tensor]]


class Synthesis(Block):
    """Keys and values of all skipped layers at once, from the state at an exit point.

    Args:
        graph: Maps ``hidden [1, M, D]`` and prologue values to a key and a value per layer.
        sources: The layers' norms and projections.
        layers: The skipped layers.
        axes: Token axes of each input.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        sources: Sequence[TensorRef],
        layers: range,
        axes: Sequence[TokenAxes],
    ) -> None:
        super().__init__(graph, sources)
        self.layers = layers
        self.axes = list(axes)

    def forward(self, tokens: Any, *inputs: Tensor) -> SynthesizedKV | None:
        """Returns the keys and values of the tokens that leave here; None if none needs any."""
        if tokens.departed is None:
            return None
        leaving = [
            tokens.gather_departed(item, axes) if axes else item
            for item, axes in zip(inputs, self.axes, strict=True)
        ]
        flat = super().forward(*leaving)
        pairs = {layer: (flat[2 * i], flat[2 * i + 1]) for i, layer in enumerate(self.layers)}
        return SynthesizedKV(tokens.departed, pairs)

    def extra_repr(self) -> str:
        """Which layers the block fills."""
        return f"layers {self.layers.start}..{self.layers.stop - 1}"


class AttentionRegion(nn.Module):
    """A layer's attention, from the cache to its output.

    In the compacted layout, queries are padded per row, rows without a live token are dropped,
    and the output is packed again.

    Args:
        graph: Graph over keys, values and the other inputs.
        kinds: Per other input: ``"live"`` (in the stage's layout), ``"call"`` (in the layout of
            the call: masks, position biases) or ``"plain"`` (no token axes).
        axes: Token axes of the other inputs.
        output: Token axes of the output.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        kinds: Sequence[str],
        axes: Sequence[TokenAxes],
        output: TokenAxes,
    ) -> None:
        super().__init__()
        self.graph = graph
        self.kinds = list(kinds)
        self.axes = list(axes)
        self.output = output

    def forward(self, tokens: Any, keys: Tensor, values: Tensor, *inputs: Tensor | None) -> Any:
        """Attends; ``keys`` and ``values`` are the cache's, ``[R, H, T, D]``."""
        if tokens.index is None:
            return self.graph(keys, values, *inputs)
        rows = tokens.rows
        padded = [
            tokens.to_rows(item, kind, axes, keys)
            for item, kind, axes in zip(inputs, self.kinds, self.axes, strict=True)
        ]
        output = self.graph(rows.select(keys), rows.select(values), *padded)
        return rows.pack(output, self.output)
