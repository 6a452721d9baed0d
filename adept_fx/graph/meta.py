"""Typed node meta: what the passes of this project know about a node."""

from dataclasses import dataclass, replace

from torch.fx import Node

KEY = "adept_fx"

PROLOGUE = -1


@dataclass(frozen=True)
class NodeMeta:
    """Facts about one node.

    Attributes:
        source: Fully qualified name of the parameter, buffer or constant behind a placeholder.
        layer: Index of the layer that computes the node; ``PROLOGUE`` before the first, the
            number of layers after the last; None for what depends on parameters only.
        border: ``l`` if the value is the residual state after ``l`` layers (input of layer ``l``).
        exit: Index of the exit point that the node belongs to.
        opaque: Class of a parameter that only its own class can compute with, such as a quantized
            one; None for plain tensors.
    """

    source: str | None = None
    layer: int | None = None
    border: int | None = None
    exit: int | None = None
    opaque: str | None = None


def get(node: Node) -> NodeMeta:
    """The node's facts; empty ones if nothing is known yet."""
    found: NodeMeta = node.meta.get(KEY, NodeMeta())
    return found


def update(node: Node, **facts: object) -> None:
    """Adds facts to the node."""
    node.meta[KEY] = replace(get(node), **facts)  # type: ignore[arg-type]
