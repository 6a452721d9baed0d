"""Prepares the graph of a stage for compilation."""

import re
from collections.abc import Sequence
from typing import Any

from torch import fx, nn
from torch.fx import Node

from adept_fx.gates.base import Gate
from adept_fx.graph.blocks import Stage
from adept_fx.lower.gate import GateRegion
from adept_fx.ops import tokens as ops
from adept_fx.runtime.gate_inputs import wanted

_WRITES = (ops.write_cache, ops.write_index)


def slot_names(stage: Stage) -> dict[str, str]:
    """What lowered graphs call the slots of a stage: by number among the stage's own.

    Slots that other stages read keep their names.
    """
    graph = stage.graph.graph
    fixed = {node.args[1] for node in graph.find_nodes(op="call_function", target=ops.read_cache)}
    fixed |= _shared(stage)
    return {
        owed.slot: owed.slot if owed.slot in fixed else re.sub(r"\d+$", str(at), owed.slot)
        for at, owed in enumerate(stage.owed)
    }


def _shared(stage: Stage) -> set[Any]:
    """Slots whose values later stages read."""
    graph = stage.graph.graph
    writes = [n for t in _WRITES for n in graph.find_nodes(op="call_function", target=t)]
    return {node.args[-3] for node in writes if node.args[-1] is True}


def shares(stage: Stage) -> bool:
    """Whether later stages read what this one writes."""
    return bool(_shared(stage))


def lower(stage: Stage, *, freeze: bool) -> fx.GraphModule:
    """A stage's graph without what only the eager executor needs.

    Keys of tokens that have left come with the layout, slots are numbered, and where no token has
    left nothing is frozen: equal stages get equal graphs.

    Args:
        stage: The stage.
        freeze: Keep the states of tokens that have left.
    """
    names = slot_names(stage)
    graph = fx.Graph()
    copies: dict[Node, Any] = {}
    inputs = stage.graph.graph.find_nodes(op="placeholder")
    end = len(inputs) - len(stage.sources)
    gone = set(inputs[end - stage.synthesized : end])

    def renamed(item: Any) -> Any:
        if isinstance(item, Node):
            return copies[item]
        if isinstance(item, (tuple, list)):
            return type(item)(renamed(part) for part in item if part not in gone)
        return names.get(item, item) if isinstance(item, str) else item

    for node in stage.graph.graph.nodes:
        if node in gone:
            continue
        if node.target in (ops.freeze_tokens, ops.map_tokens) and not freeze:
            copies[node] = copies[node.args[1]]
            continue
        if node.op == "output":
            graph.output(renamed(node.args[0]))
            continue
        arguments = renamed(tuple(node.args))
        keywords = {key: renamed(value) for key, value in node.kwargs.items()}
        copies[node] = graph.create_node(
            node.op, node.target, arguments, keywords, node.name, node.type
        )
        copies[node].meta = dict(node.meta)
    graph.lint()
    return fx.GraphModule(stage.graph, graph, class_name="Stage")


def with_gate(graph: fx.GraphModule, gate: Gate | None) -> fx.GraphModule:
    """A graph of its own that ends with a gate: ``(hidden, *features, scores)``."""
    copied = fx.Graph()
    copies: dict[Node, Node] = {}
    outputs: Any = copied.graph_copy(graph.graph, copies)
    parts: dict[str, nn.Module] = dict(graph.named_children())
    if gate is not None:
        found = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        parts["gate"] = GateRegion(gate)
        tokens = copies[next(iter(graph.graph.nodes))]
        seen = found[: 1 + len(wanted(gate.needs))]
        outputs = (*found, copied.call_module("gate", (tokens, *seen)))
    copied.output(outputs)
    return fx.GraphModule(parts, copied, class_name="Stage")


def writing(names: Sequence[str]) -> fx.GraphModule:
    """A graph that writes values to slots: ``(layout, *values)``, keys and values in turn."""
    graph = fx.Graph()
    layout = graph.placeholder("tokens")
    functions = [ops.write_index if n.startswith("indexer") else ops.write_cache for n in names]
    values = [
        [graph.placeholder(f"{name}_{at}") for at in range(1 if f is ops.write_index else 2)]
        for name, f in zip(names, functions, strict=True)
    ]
    for name, function, own in zip(names, functions, values, strict=True):
        graph.call_function(function, (layout, *own, name, ()))
    graph.output(())
    return fx.GraphModule(nn.Module(), graph, class_name="Writing")
