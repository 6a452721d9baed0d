"""Which nodes of the flat graph each stage holds, reads and returns."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Node

from adept_fx.errors import UnsupportedModelError
from adept_fx.graph import meta
from adept_fx.graph.base import Work
from adept_fx.graph.extract import needed
from adept_fx.graph.meta import PROLOGUE
from adept_fx.graph.symbols import Symbols, is_scalar

FREEZE = torch.ops.adept_fx.freeze.default
WRITE = torch.ops.adept_fx.cache_write.default
GATE = torch.ops.adept_fx.gate.default


def data_inputs(node: Node) -> list[Node]:
    """What a node needs once lowered: gates, probes and synthesized values come otherwise."""
    if node.target in (FREEZE, WRITE):
        return [i for i in node.args[:2] if isinstance(i, Node)]
    return node.all_input_nodes


@dataclass
class Partition:
    """Which nodes each part returns and reads.

    ``live[i]`` are values from before stage ``i`` that it needs in its own layout, ``call[i]``
    those that its attention regions need in the layout of the call.
    """

    order: dict[Node, int]
    borders: dict[int, Node]
    nodes: list[list[Node]] = field(default_factory=list)
    outputs: list[list[Node]] = field(default_factory=list)
    live: list[list[Node]] = field(default_factory=list)
    call: list[list[Node]] = field(default_factory=list)

    @staticmethod
    def of(work: Work) -> "Partition":
        """Cuts the flat graph at its exit points and after the last layer."""
        graph = work.graph.graph
        borders = {b: n for n in graph.nodes if (b := meta.get(n).border) is not None}
        self = Partition({n: i for i, n in enumerate(graph.nodes)}, borders)
        bounds = [0, *work.exits, work.num_layers]
        gates = {gate.args[3]: gate for gate in work.find(GATE)}
        for index, (low, high) in enumerate(pairwise(bounds)):
            features: Any = gates[index].args[1] if index in gates else []
            self._add_stage(range(low, high), [borders[high], *features], work.symbols)
        epilogue = list(graph.output_node().all_input_nodes)
        last = range(work.num_layers, work.num_layers + 1)
        self._add_stage(last, epilogue, work.symbols)
        return self

    def _add_stage(self, layers: range, outputs: list[Node], symbols: Symbols) -> None:
        outside = Outside(layers, self.borders.get(layers.start) if layers.start else None)
        nodes = needed(outputs, outside, self.order, symbols, data_inputs)
        live: dict[Node, None] = {}
        call: dict[Node, None] = {}
        for node in nodes:
            region = node.op == "call_module"
            for i in data_inputs(node):
                if i not in outside or i is outside.border or is_scalar(i):
                    continue
                _check_source(i, node)
                in_call_layout = region and meta.get(i).layer == PROLOGUE
                (call if in_call_layout else live)[i] = None
        self.nodes.append(nodes)
        self.outputs.append(outputs)
        self.live.append(list(live))
        self.call.append(list(call))


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


def _check_source(value: Node, reader: Node) -> None:
    """Between layers nothing may pass but the residual stream."""
    if value.op != "placeholder" and meta.get(value).layer != PROLOGUE:
        raise UnsupportedModelError(
            f"layer {meta.get(reader).layer} reads {value.name} of layer {meta.get(value).layer} "
            "besides the residual stream",
            hint="decoders that pass more than one value between layers are not supported yet",
        )
