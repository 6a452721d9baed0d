"""Merges the projections of skipped layers into one call per kind."""

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node
from torch.fx.passes.tools_common import stable_topological_sort

from adept_fx.graph import meta
from adept_fx.graph.symbols import ancestors
from adept_fx.ops.project import project_layers

_LINEAR = torch.ops.aten.linear.default


def merge_projections(module: fx.GraphModule) -> int:
    """Calls :func:`~adept_fx.ops.project.project_layers` once per kind of projection.

    Projections are of one kind if their weights, found in the model, have one shape and dtype, and
    none depends on another: keys of all layers, values of all layers.

    Returns:
        Number of projections merged.
    """
    kinds: dict[Any, list[Node]] = defaultdict(list)
    for node in module.graph.find_nodes(op="call_function", target=_LINEAR):
        if _owned(node):
            kinds[_kind(node)].append(node)
    merged = 0
    for nodes in kinds.values():
        if len(nodes) > 1 and not any(set(nodes) & (ancestors([n]) - {n}) for n in nodes):
            _merge(module.graph, nodes)
            merged += len(nodes)
    if merged:
        stable_topological_sort(module)
        module.graph.lint()
        module.recompile()
    return merged


def _owned(node: Node) -> bool:
    tensors = [i for i in node.args[1:] if i is not None]
    return all(isinstance(i, Node) and meta.get(i).source is not None for i in tensors)


def _kind(node: Node) -> Any:
    """What one batch may hold: the last part of the weight's name keeps keys from values."""
    weight: Any = node.args[1]
    value: Tensor = weight.meta["val"]
    name = "".join(c for c in str(meta.get(weight).source) if not c.isdigit())
    shape = tuple(node.args[0].meta["val"].shape)  # type: ignore[union-attr]
    return (name, tuple(value.shape), value.dtype, str(shape), len(node.args))


def _merge(graph: fx.Graph, nodes: list[Node]) -> None:
    states = [node.args[0] for node in nodes]
    weights = [node.args[1] for node in nodes]
    biases = [node.args[2] for node in nodes] if len(nodes[0].args) > 2 else [None]
    with graph.inserting_after(nodes[-1]):
        call = graph.call_function(
            project_layers, (states, weights, None if None in biases else biases)
        )
    call.meta["val"] = [node.meta["val"] for node in nodes]
    for at, node in enumerate(nodes):
        with graph.inserting_after(call):
            item = graph.call_function(operator.getitem, (call, at))
        item.meta = dict(node.meta)
        node.replace_all_uses_with(item)
        graph.erase_node(node)
