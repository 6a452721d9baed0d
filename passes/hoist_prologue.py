"""Moves what no layer computes to the front, once."""

from typing import Any

from torch.fx import Node

from adept_fx.errors import PassError
from adept_fx.graph import meta
from adept_fx.graph.base import Pass, PassResult, Stage, Work
from adept_fx.graph.extract import is_pure, value_key
from adept_fx.graph.meta import PROLOGUE
from adept_fx.graph.symbols import ancestors


class HoistPrologue(Pass):
    """Computes positions, rotary tables and the like once, before the first layer.

    Before: every layer has its own ``unsqueeze(cos, 1)``.
    After: one ``unsqueeze(cos, 1)``, in front of the layers; all layers read it.

    Guarantees: prologue nodes precede the layers' nodes; no two of them are equal.
    """

    needs = Stage.LAYERED
    reaches = Stage.HOISTED

    def call(self, work: Work) -> PassResult:
        """Merges equal nodes, then moves the rest."""
        graph = work.graph.graph
        prologue = [n for n in graph.nodes if _is_prologue(n)]
        kept: dict[Any, Node] = {}
        merged = 0
        for node in prologue:
            first = kept.setdefault(value_key(node), node) if is_pure(node) else node
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)
                merged += 1
        wanted = ancestors(n for n in graph.nodes if _is_prologue(n))
        moved = _move_to_front(work, [n for n in graph.nodes if n in wanted])
        return PassResult(bool(merged or moved), {"merged": merged, "moved": moved})

    def ensures(self, work: Work) -> None:
        """Checks the order."""
        layers = False
        seen: dict[Any, Node] = {}
        for node in work.graph.graph.nodes:
            if _is_prologue(node) and layers:
                raise PassError(f"{node.name} of the prologue comes after a layer")
            if _is_prologue(node) and is_pure(node):
                first = seen.setdefault(value_key(node), node)
                if first is not node:
                    raise PassError(f"{node.name} of the prologue is equal to {first.name}")
            layers |= node.op != "placeholder" and (meta.get(node).layer or 0) > 0


def _is_prologue(node: Node) -> bool:
    return node.op == "call_function" and meta.get(node).layer == PROLOGUE


def _move_to_front(work: Work, nodes: list[Node]) -> int:
    graph = work.graph.graph
    anchor = graph.find_nodes(op="placeholder")[-1]
    moved = 0
    for node in nodes:
        if node.op == "placeholder":
            continue
        if anchor.next is not node:
            anchor.append(node)
            moved += 1
        anchor = node
    return moved
