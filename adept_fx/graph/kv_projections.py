"""Tells how the keys and values of skipped layers are projected."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx import Node

from adept_fx.graph import meta
from adept_fx.ops.project import project_heads, project_layers, project_stacked

_aten = torch.ops.aten
# Calls that multiply by a weight, and the place of the weight among their arguments.
_WEIGHT = {
    _aten.linear.default: 1,
    _aten.addmm.default: 2,
    _aten.mm.default: 1,
    _aten.matmul.default: 1,
    F.linear: 1,
    project_heads: 1,
    project_layers: 1,
    project_stacked: 1,
}


@dataclass(frozen=True)
class KVProjection:
    """How the synthesis of keys and values computes one projection of the skipped layers.

    Attributes:
        weight: Name of the weight, with ``*`` for the layer's number.
        layers: Number of skipped layers that it is computed for.
        form: ``"stacked"``: one batched product for all layers, where that is faster (after
            ``compile()``); ``"merged"``: one call for all layers, which compiling can stack;
            ``"cut"``: layer by layer, only the columns that keys and values need;
            ``"plain"``: layer by layer, as the model itself does.
        note: What kept a weight from being cut or merged, and what that costs.
    """

    weight: str
    layers: int
    form: str
    note: str = ""


def without_numbers(name: str) -> str:
    """A parameter's name with ``*`` in place of the layer's number (and of others)."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def kv_projections(graph: fx.Graph) -> tuple[KVProjection, ...]:
    """Reads the projections off the graph that synthesizes keys and values.

    Args:
        graph: One exit point's KV graph; placeholders of weights have ``NodeMeta.source``.
    """
    kinds: dict[tuple[str, str, str], dict[Node, int]] = {}
    for weight, form, note in _all(graph):
        layers = weight.meta["val"].shape[0] if form == "stacked" else 1
        kinds.setdefault((_name(weight), form, note), {})[weight] = layers
    return tuple(
        KVProjection(name, sum(layers.values()), form, note)
        for (name, form, note), layers in kinds.items()
    )


def _all(graph: fx.Graph) -> Iterator[tuple[Node, str, str]]:
    """Weight, form and note of each product; a cut weight may come several times."""
    for node in graph.nodes:
        if node.target is project_layers:
            weights: Any = node.args[1]
            for weight, item in zip(weights, sorted(node.users, key=_position), strict=True):
                yield weight, "merged", _whole(item, graph)
        elif node.target in _WEIGHT:
            weight, cut = _source_behind(node.args[_WEIGHT[node.target]])
            if weight is None:
                continue  # a product of two computed values
            if node.target is project_stacked:
                yield weight, "stacked", ""
            elif cut or node.target is project_heads:
                yield weight, "cut", ""
            else:
                yield weight, "plain", _reason(weight, node, graph)


def _position(item: Node) -> int:
    return int(item.args[1])  # type: ignore[arg-type]


def _name(weight: Node) -> str:
    return without_numbers(meta.get(weight).source or "")


def _source_behind(weight: Any) -> tuple[Node | None, bool]:
    """The model's tensor that a weight is a view or cast of, and whether it is a part of it."""
    cut = False
    while meta.get(weight).source is None:
        if len(weight.all_input_nodes) != 1:
            return None, False
        cut = cut or weight.target is _aten.slice.Tensor
        weight = weight.all_input_nodes[0]
    return weight, cut


def _reason(weight: Node, node: Node, graph: fx.Graph) -> str:
    opaque = meta.get(weight).opaque
    kind = f"{opaque} can be neither cut nor merged" if opaque else ""
    return "; ".join(part for part in (kind, _whole(node, graph)) if part)


def _whole(node: Node, graph: fx.Graph) -> str:
    """Says so if a projection computes more columns than keys and values take from it."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    columns, reached = int(value.shape[-1]), _reached(node)
    outputs = [item for item in graph.output_node().all_input_nodes if item in reached]
    needed = sum(_per_token(item) for item in outputs)
    return f"{columns} columns computed, {needed} used" if outputs and columns > needed else ""


def _reached(start: Node) -> set[Node]:
    """What depends on a projection's output without another projection between."""
    seen, stack = {start}, [start]
    while stack:
        for user in stack.pop().users:
            if user not in seen and user.target not in _WEIGHT:
                seen.add(user)
                stack.append(user)
    return seen


def _per_token(value: Node) -> int:
    """Numbers that a key or value ``[B, H, S, D]`` holds per token."""
    found = value.meta["val"]
    return math.prod(size for size in found.shape if isinstance(size, int))
