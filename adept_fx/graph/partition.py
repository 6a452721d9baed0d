"""Which nodes of the flat graph each stage holds, reads and returns."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Node

from adept_fx.errors import UnsupportedModelError
from adept_fx.graph import meta
from adept_fx.graph.base import Work
from adept_fx.graph.extract import needed
from adept_fx.graph.meta import PROLOGUE
from adept_fx.graph.symbols import Symbols, is_scalar, token_axes
from adept_fx.graph.writes import MIXER, cache_write, data_inputs, is_cached, slot

GATE = torch.ops.adept_fx.gate.default


@dataclass
class Part:
    """One stage, or what follows the last.

    Attributes:
        nodes: What it computes, in order.
        outputs: What it returns: the state, what its gate asked for, then side values that later
            parts read.
        gated: How many of the outputs the gate reads.
        live: Values from before that it needs in its own layout.
        call: Values that its attention regions and mixers need in the layout of the call.
    """

    nodes: list[Node]
    outputs: list[Node]
    gated: int
    live: list[Node]
    call: list[Node]


class Partition:
    """The parts of the flat graph, cut at its exit points and after the last layer.

    Attributes:
        order: Position of each node.
        borders: The state after so many layers.
        parts: One per stage, then what follows the last layer.
        shared: What a stage writes to the cache and a later one reads again.
    """

    def __init__(self, work: Work) -> None:
        graph = work.graph.graph
        self.order = {node: position for position, node in enumerate(graph.nodes)}
        self.borders = {b: n for n in graph.nodes if (b := meta.get(n).border) is not None}
        bounds = [0, *work.exits, work.num_layers]
        gates = {gate.args[3]: gate for gate in work.find(GATE)}
        layers = [range(low, high) for low, high in pairwise(bounds)]
        wanted: list[list[Node]] = []
        for index, span in enumerate(layers):
            features: Any = gates[index].args[1] if index in gates else []
            wanted.append([self.borders[span.stop], *features])
        layers.append(range(work.num_layers, work.num_layers + 1))
        wanted.append(list(graph.output_node().all_input_nodes))
        extras: list[list[Node]] = [[] for _ in layers]
        parts = []
        self.shared: set[str] = set()
        for index in reversed(range(len(layers))):  # later parts say what earlier ones return
            part = self._part(layers[index], wanted[index], extras[index], work.symbols)
            parts.append(part)
            for value in part.live:
                stage = _made_in(value, bounds)
                if stage is not None:
                    _check_side_value(value, index == len(wanted) - 1, work.symbols)
                    extras[stage] += [] if value in extras[stage] else [value]
        self.parts = parts[::-1]

    def _part(self, layers: range, wanted: list[Node], extra: list[Node], symbols: Symbols) -> Part:
        outside = Outside(layers, self.borders.get(layers.start) if layers.start else None)
        outputs = [*wanted, *extra]
        nodes = needed(outputs, outside, self.order, symbols, data_inputs)
        live: dict[Node, None] = {}
        call: dict[Node, None] = {}
        for node in nodes:
            rows = node.op == "call_module" or node.target is MIXER
            for i in data_inputs(node):
                if i not in outside or i is outside.border or is_scalar(i):
                    continue
                if is_cached(i):
                    self.shared.add(slot(cache_write(i)))
                    continue
                in_call_layout = rows and meta.get(i).layer == PROLOGUE
                (call if in_call_layout else live)[i] = None
        return Part(nodes, outputs, len(wanted), list(live), list(call))


def _made_in(value: Node, bounds: list[int]) -> int | None:
    """The stage that computes a value; None if it comes from before the layers."""
    layer = meta.get(value).layer
    if value.op == "placeholder" or layer is None or layer == PROLOGUE:
        return None
    return sum(bound <= layer for bound in bounds[1:])


def _check_side_value(value: Node, at_end: bool, symbols: Symbols) -> None:
    """Values beside the residual stream must have one entry per token."""
    if at_end or not token_axes(value.meta["val"], symbols).aligned:
        raise UnsupportedModelError(
            f"{value.name} of layer {meta.get(value).layer}, which is read behind a later exit "
            "point, has no entry per token"
            if not at_end
            else f"what follows the last layer reads {value.name} of layer {meta.get(value).layer}",
            hint="besides the residual stream, layers may pass token-aligned values on to layers",
        )


@dataclass
class Outside:
    """Where a part's slice stops: inputs of the graph and what other parts compute."""

    layers: range
    border: Node | None

    def __contains__(self, node: object) -> bool:
        if not isinstance(node, Node) or node is self.border:
            return node is self.border
        facts = meta.get(node)
        if facts.source is not None or facts.layer is None:
            return False  # depends on parameters only: computed where it is needed
        return node.op == "placeholder" or facts.layer not in self.layers
