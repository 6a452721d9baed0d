"""Inserts a gate at every exit point and keeps exited tokens' states from there on."""

from typing import Any

import torch
from torch.fx import Node

from adept_fx.errors import PassError, UnsupportedModelError
from adept_fx.graph import meta
from adept_fx.graph.base import Pass, PassResult, Stage, Work
from adept_fx.graph.writes import WRITE, written

_GATE = torch.ops.adept_fx.gate.default
_FREEZE = torch.ops.adept_fx.freeze.default
FEATURES = ("previous", "query", "key", "value")


class InsertGates(Pass):
    """Makes the graph exit-aware: the masked-dense form.

    Before: ``h_4 = add(...)``, ``h_5 = add(...)``.
    After: ``h_4 = add(...)``, ``active = gate(h_4, [...], None, 0)``,
    ``h_5 = freeze(add(...), h_4, active)``.

    Guarantees: one gate per exit point; one freeze per layer border after the first exit point,
    in the order of the layers.

    Refuses when: an exit point is no layer border; a gate asks for a query that the layer before
    does not hand to a registered attention function.
    """

    needs = Stage.FOLDED
    reaches = Stage.GATED

    def requires(self, work: Work) -> None:
        """Exit points lie in ``1..L-1``."""
        bad = [e for e in work.exits if not 1 <= e < work.num_layers]
        if bad:
            raise PassError(f"exit points {bad} are outside 1..{work.num_layers - 1}")

    def call(self, work: Work) -> PassResult:
        """Walks the borders from the first exit point on."""
        if work.find(_GATE):
            return PassResult(False, self._count(work))
        borders = {
            meta.get(node).border: node
            for node in work.graph.graph.nodes
            if meta.get(node).border is not None
        }
        active: Node | None = None
        for layer in range(work.exits[0], work.num_layers + 1):
            if active is not None:
                borders[layer] = _freeze(work, borders[layer], borders[layer - 1], active)
            if layer in work.exits:
                active = _gate(work, work.exits.index(layer), borders, active)
        return PassResult(True, self._count(work))

    def _count(self, work: Work) -> dict[str, int]:
        return {"gates": len(work.find(_GATE)), "freezes": len(work.find(_FREEZE))}

    def ensures(self, work: Work) -> None:
        """Counts are a function of layers and exits."""
        counts = self._count(work)
        expected = {"gates": len(work.exits), "freezes": work.num_layers - work.exits[0]}
        if counts != expected:
            raise PassError(f"insert_gates made {counts}, not {expected}")
        self._check_freezes(work)

    def _check_freezes(self, work: Work) -> None:
        borders = {b: n for n in work.graph.graph.nodes if (b := meta.get(n).border) is not None}
        gates = work.find(_GATE)
        for layer in range(work.exits[0] + 1, work.num_layers + 1):
            last = gates[sum(e < layer for e in work.exits) - 1]
            node = borders[layer]
            if node.target is not _FREEZE or node.args[1:] != (borders[layer - 1], last):
                raise PassError(f"the freeze after layer {layer - 1} keeps another state")


def _freeze(work: Work, new: Node, frozen: Node, active: Node) -> Node:
    with work.graph.graph.inserting_after(new):
        node = work.graph.graph.call_function(_FREEZE, (new, frozen, active))
    facts = meta.get(new)
    new.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    meta.update(new, border=None)
    meta.update(node, layer=facts.layer, border=facts.border)
    return node


def _gate(work: Work, index: int, borders: dict[Any, Node], active: Node | None) -> Node:
    hidden = borders[work.exits[index]]
    features = _features(work, index, borders)
    with work.graph.graph.inserting_after(hidden):
        node = work.graph.graph.call_function(_GATE, (hidden, features, active, index))
    meta.update(node, layer=meta.get(hidden).layer, exit=index)
    return node


def _features(work: Work, index: int, borders: dict[Any, Node]) -> list[Node]:
    """What the gate asked for, in the order of ``FEATURES``."""
    layer = work.exits[index] - 1
    wanted = work.needs[index]
    found: dict[str, Node] = {"previous": borders[layer]}
    write = next((w for w in work.find(WRITE) if meta.get(w).layer == layer), None)
    if write is not None:
        found["key"], found["value"] = written(write)
    if layer in work.queries:
        found["query"] = _query(work, *work.queries[layer])
    missing = [name for name in FEATURES if name in wanted and name not in found]
    if missing:
        raise UnsupportedModelError(
            f"the gate at exit {work.exits[index]} needs the {missing[0]} of layer {layer}, which "
            "the model does not pass to a cache or a registered attention function",
            hint=f"use a gate that does not list {missing[0]!r} in Gate.needs",
        )
    return [found[name] for name in FEATURES if name in wanted]


def _query(work: Work, region: str, place: int) -> Node:
    call = next(n for n in work.graph.graph.nodes if n.op == "call_module" and n.target == region)
    query = call.args[place]
    if not isinstance(query, Node):
        raise PassError(f"{region} has no query")
    return query
