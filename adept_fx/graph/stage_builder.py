"""Builds the graph of one stage."""

from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node

from adept_fx.errors import PassError, UnsupportedModelError
from adept_fx.graph.base import Work
from adept_fx.graph.blocks import AttentionRegion, MixerRegion, Owed
from adept_fx.graph.extract import Extraction
from adept_fx.graph.partition import Partition
from adept_fx.graph.symbols import token_axes
from adept_fx.graph.writes import (
    INDEX,
    MIXER,
    WRITE,
    cache_write,
    data_inputs,
    is_cached,
    is_write,
    mixer_inputs,
    slot,
    written,
)
from adept_fx.ops import tokens as ops
from adept_fx.ops.mixer import Mixer

FREEZE = torch.ops.adept_fx.freeze.default
MAP = torch.ops.adept_fx.map_state.default


class StageBuilder:
    """Copies the nodes of one stage, with marker ops lowered to calls on the tokens' layout.

    Attributes:
        owed: What the stage must still do for the cache when none of its layers runs.
    """

    def __init__(self, work: Work, plan: Partition, index: int, synthesized: int) -> None:
        self.work = work
        self.plan = plan
        self.index = index
        self.cut = plan.parts[index]
        self.live = [n for n in self.cut.live if n.name != "inputs_embeds" or index]
        self.part = Extraction(work.symbols)
        self.tokens = self.part.placeholder("tokens")
        self.root = nn.Module()
        self.synthesized_count = synthesized
        self.call: dict[Node, Node] = {}
        self.kv: list[Node] = []
        self.owed: list[Owed] = []

    def build(self, layers: range) -> fx.GraphModule:
        """Returns the stage's graph: ``(tokens, hidden, *live, *call, *kv, *parameters)``."""
        part = self.part
        hidden = self.plan.borders[layers.start] if self.index else embeds_input(self.work)
        part.add_input(hidden, "hidden")
        for node in self.live:
            part.add_input(node)
        for node in self.cut.call:
            self.call[node] = part.placeholder(node.name, node)
        self.kv = [part.placeholder(f"kv_{i}") for i in range(self.synthesized_count)]
        part.copy(self.cut.nodes, self._lower)
        outputs = self.cut.outputs
        return part.finish(outputs[0] if len(outputs) == 1 else tuple(outputs), self.root)

    def _lower(self, part: Extraction, node: Node) -> Node | None:
        if node.target is FREEZE:
            new, frozen = (part.lookup(i) for i in data_inputs(node))
            return part.graph.call_function(ops.freeze_tokens, (self.tokens, new, frozen))
        if node.target is MAP:
            values = [part.lookup(i) for i in data_inputs(node)]
            which, exits = node.args[4], tuple(self.work.exits)
            return part.graph.call_function(ops.map_tokens, (self.tokens, *values, which, exits))
        if is_write(node):
            return self._write(part, node)
        if node.op == "call_module":
            return self._attention(part, node)
        return None

    def _write(self, part: Extraction, node: Node) -> Node:
        if node.target is MIXER:
            return self._mixer(part, node)
        values = [part.lookup(i) for i in written(node)]
        function = ops.write_cache if node.target is WRITE else ops.write_index
        self.owed.append(_owed(node))
        shared = (True,) if slot(node) in self.plan.shared else ()
        arguments = (self.tokens, *values, slot(node), tuple(self.kv), *shared)
        return part.graph.call_function(function, arguments)

    def _mixer(self, part: Extraction, node: Node) -> Node:
        index: Any = node.args[4]
        streams = [i for i in mixer_inputs(node) if i in written(node)]
        others = [i for i in mixer_inputs(node) if i not in written(node)]
        for i in (*streams, *others):
            axes = token_axes(i.meta["val"], self.work.symbols)
            if i in streams and (axes.batch, axes.token, axes.inner) != (0, 1, 1):
                raise UnsupportedModelError(
                    f"{self.work.mixers[index].name} reads {i.name}, which is not [batch, tokens, "
                    "...]",
                    hint="modules with recurrent state must read token-aligned values",
                )
        places = tuple(i in streams for i in mixer_inputs(node))
        region = MixerRegion(Mixer(self.work.mixers[index]), slot(node), places)
        self.root.add_module(slot(node), region)
        at = [len(self.live) + self.cut.call.index(i) for i in others]
        self.owed.append(_owed(node, region, tuple(at)))
        arguments = [*(part.lookup(i) for i in streams), *(self.call[i] for i in others)]
        return part.graph.call_module(slot(node), (self.tokens, tuple(self.kv), *arguments))

    def _attention(self, part: Extraction, node: Node) -> Node:
        symbols = self.work.symbols
        kinds, axes = [], []
        arguments: list[Any] = []
        for i in node.args:
            if not isinstance(i, Node):
                raise PassError(f"attention region {node.name} has the constant input {i}")
            found = token_axes(i.meta["val"], symbols)
            in_call = i in self.call
            kind = "plain" if not found else "call" if in_call else "live"
            kinds.append("cached" if is_cached(i) else kind)
            axes.append(found)
            if kinds[-1] == "call" and found.batch is None and not _has_leading_one(i):
                raise UnsupportedModelError(
                    f"{i.name}, which attention reads, has one entry per token position and none "
                    "per row",
                    hint="such a value cannot be laid out for rows of different length",
                )
            arguments.append(self._cached(part, i) if is_cached(i) else self._input(part, i))
        graph = self.work.graph.get_submodule(str(node.target))
        value = node.meta["val"]
        outputs = value if isinstance(value, tuple) else (value,)
        if not isinstance(graph, fx.GraphModule):
            raise PassError(f"{node.target} is no attention region")
        output = [token_axes(item, symbols) for item in outputs]
        self.root.add_module(str(node.target), AttentionRegion(graph, kinds, axes, output))
        return part.graph.call_module(str(node.target), (self.tokens, *arguments))

    def _input(self, part: Extraction, node: Node) -> Any:
        return self.call[node] if node in self.call else part.lookup(node)

    def _cached(self, part: Extraction, node: Node) -> Any:
        """Cached keys: written in this stage, or kept by the run since an earlier one."""
        if node in part.copies:
            return part.copies[node]
        at = 0 if node.target is INDEX else node.args[1]
        arguments = (self.tokens, slot(cache_write(node)), at)
        return part.graph.call_function(ops.read_cache, arguments)


def _owed(node: Node, region: MixerRegion | None = None, inputs: tuple[int, ...] = ()) -> Owed:
    values = [item.meta["val"] for item in written(node)]
    # Batch comes first, tokens last but one.
    shapes = tuple((*map(int, v.shape[1:-2]), int(v.shape[-1])) for v in values)
    return Owed(slot(node), region, inputs, shapes, tuple(v.dtype for v in values))


def _has_leading_one(node: Node) -> bool:
    value = node.meta["val"]
    return value.ndim > 2 and isinstance(value.shape[0], int) and value.shape[0] == 1


def embeds_input(work: Work) -> Node:
    """The flat graph's ``inputs_embeds``."""
    inputs = work.graph.graph.find_nodes(op="placeholder")
    found: Node = next(node for node in inputs if node.name == "inputs_embeds")
    return found
