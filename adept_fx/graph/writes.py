"""What layers leave in the cache: keys and values, index keys, recurrent state.

One view of the three marker ops, so that passes treat them alike. A *slot* names what one of
them writes, ``kv_3`` or ``mixer_0``; synthesized values of tokens that left early find their
place by it.
"""

import operator
from typing import Any

import torch
from torch.fx import Node

import adept_fx.ops  # noqa: F401 -- defines the marker ops
from adept_fx.graph import meta
from adept_fx.graph.meta import PROLOGUE

WRITE = torch.ops.adept_fx.cache_write.default
INDEX = torch.ops.adept_fx.index_write.default
MIXER = torch.ops.adept_fx.mixer.default

_SYNTHESIZED = {WRITE: 4, INDEX: 3, MIXER: 5}


def is_write(node: Node) -> bool:
    """Whether the node writes to the cache."""
    return node.target in _SYNTHESIZED


def writes(nodes: Any) -> list[Node]:
    """All nodes that write to the cache, in order."""
    return [node for node in nodes if is_write(node)]


def slot(node: Node) -> str:
    """The name of what the node writes."""
    if node.target is WRITE:
        return f"kv_{node.args[3]}"
    if node.target is INDEX:
        return f"indexer_{node.args[2]}"
    return f"mixer_{node.args[4]}"


def written(node: Node) -> list[Node]:
    """The values, one entry per token, that reach the cache through the node."""
    if node.target is WRITE:
        found: Any = node.args[:2]
    elif node.target is INDEX:
        found = node.args[:1]
    else:
        found = [i for i in mixer_inputs(node) if meta.get(i).layer != PROLOGUE]
    return list(found)


def mixer_inputs(node: Node) -> list[Node]:
    """All tensors that a mixer reads, as recorded."""
    found: Any = node.args[0]
    return list(found)


def synthesized(node: Node) -> list[Node]:
    """The values listed for tokens that left earlier, exit point by exit point."""
    found: Any = node.args[_SYNTHESIZED[node.target]]  # type: ignore[index]
    return list(found)


def add_synthesized(node: Node, values: list[Node]) -> None:
    """Lists more such values."""
    at = _SYNTHESIZED[node.target]  # type: ignore[index]
    node.update_arg(at, [*synthesized(node), *values])


def is_cached(node: Node) -> bool:
    """Whether the node stands for all keys (or values) of a cache layer."""
    return cache_write(node).target in (WRITE, INDEX)


def cache_write(item: Node) -> Node:
    """The write behind a node that stands for all keys (or values)."""
    source = item.args[0] if item.target is operator.getitem else item
    return source if isinstance(source, Node) else item


def data_inputs(node: Node) -> list[Node]:
    """What a node needs once lowered: gates, probes and synthesized values come otherwise."""
    if node.target in (WRITE, INDEX):
        return written(node)
    if node.target is MIXER:
        return mixer_inputs(node)
    if node.target is torch.ops.adept_fx.freeze.default:
        return [i for i in node.args[:2] if isinstance(i, Node)]
    if node.target is torch.ops.adept_fx.map_state.default:
        return [i for i in (node.args[0], *node.args[2:4]) if isinstance(i, Node)]
    return node.all_input_nodes
