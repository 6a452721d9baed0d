"""Builds the graph of one stage."""

from typing import Any

from torch import Tensor, fx, nn
from torch.fx import Node

from adept_fx.errors import PassError
from adept_fx.graph.base import Work
from adept_fx.graph.blocks import AttentionRegion
from adept_fx.graph.extract import Extraction
from adept_fx.graph.partition import FREEZE, WRITE, Partition, data_inputs
from adept_fx.graph.symbols import token_axes
from adept_fx.ops import tokens as ops


class StageBuilder:
    """Copies the nodes of one stage, with marker ops lowered to calls on the tokens' layout."""

    def __init__(self, work: Work, plan: Partition, index: int, synthesized: int) -> None:
        self.work = work
        self.plan = plan
        self.index = index
        self.live = [n for n in plan.live[index] if n.name != "inputs_embeds" or index]
        self.part = Extraction(work.symbols)
        self.tokens = self.part.placeholder("tokens")
        self.root = nn.Module()
        self.synthesized_count = synthesized
        self.call: dict[Node, Node] = {}
        self.kv: list[Node] = []

    def build(self, layers: range) -> fx.GraphModule:
        """Returns the stage's graph: ``(tokens, hidden, *live, *call, *kv, *parameters)``."""
        part, plan = self.part, self.plan
        hidden = plan.borders[layers.start] if self.index else embeds_input(self.work)
        part.add_input(hidden, "hidden")
        for node in self.live:
            part.add_input(node)
        for node in plan.call[self.index]:
            self.call[node] = part.placeholder(node.name, node)
        self.kv = [part.placeholder(f"kv_{i}") for i in range(self.synthesized_count)]
        part.copy(plan.nodes[self.index], self._lower)
        outputs = plan.outputs[self.index]
        return part.finish(outputs[0] if len(outputs) == 1 else tuple(outputs), self.root)

    def _lower(self, part: Extraction, node: Node) -> Node | None:
        if node.target is FREEZE:
            new, frozen = (part.lookup(i) for i in data_inputs(node))
            return part.graph.call_function(ops.freeze_tokens, (self.tokens, new, frozen))
        if node.target is WRITE:
            key, value = (part.lookup(i) for i in data_inputs(node))
            arguments = (self.tokens, key, value, node.args[3], tuple(self.kv))
            return part.graph.call_function(ops.write_cache, arguments)
        if node.op == "call_module":
            return self._attention(part, node)
        return None

    def _attention(self, part: Extraction, node: Node) -> Node:
        symbols = self.work.symbols
        kinds, axes = [], []
        arguments: list[Any] = [part.lookup(i) for i in data_inputs(node)[:2]]
        for i in node.args[2:]:
            if not isinstance(i, Node):
                raise PassError(f"attention region {node.name} has the constant input {i}")
            found = token_axes(i.meta["val"], symbols)
            in_call = i in self.call
            kinds.append("plain" if not found else "call" if in_call else "live")
            axes.append(found)
            arguments.append(self.call[i] if in_call else part.lookup(i))
        graph = self.work.graph.get_submodule(str(node.target))
        output = token_axes(node.meta["val"], symbols)
        if not isinstance(graph, fx.GraphModule) or not isinstance(node.meta["val"], Tensor):
            raise PassError(f"{node.target} is no attention region")
        self.root.add_module(str(node.target), AttentionRegion(graph, kinds, axes, output))
        return part.graph.call_module(str(node.target), (self.tokens, *arguments))


def embeds_input(work: Work) -> Node:
    """The flat graph's ``inputs_embeds``."""
    inputs = work.graph.graph.find_nodes(op="placeholder")
    found: Node = next(node for node in inputs if node.name == "inputs_embeds")
    return found
