"""Builds the subgraphs that compute keys and values of skipped layers."""

import operator
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import Node

from adept_fx.errors import PassError, UnsupportedModelError
from adept_fx.graph import meta
from adept_fx.graph.base import Pass, PassResult, Stage, Work
from adept_fx.graph.extract import Extraction, needed
from adept_fx.graph.merge import merge_projections
from adept_fx.graph.meta import PROLOGUE
from adept_fx.graph.projections import cut_unused_columns
from adept_fx.graph.symbols import is_scalar
from adept_fx.graph.writes import add_synthesized, is_write, slot, synthesized, writes, written

_GATE = torch.ops.adept_fx.gate.default
_FREEZE = torch.ops.adept_fx.freeze.default
_MAP = torch.ops.adept_fx.map_state.default
_LAYER_NORM = torch.ops.aten.layer_norm.default


class SynthesizeKV(Pass):
    """Gives every exit point the keys and values that all skipped layers owe to later tokens.

    For each layer ``l >= e`` the backward slice from its cache write to its input is copied with
    the exit state ``h_e`` (behind the policy's KV map) in place of the input. All layers share
    one graph, in which equal expressions are computed once: the norm statistic, the rotary
    tables. Of a fused projection only the key and value columns are computed.

    Before: ``cache_write(k, v, slots, 5, [])``.
    After: ``kv_0 = kv_0(h_4, cos, sin)``, ``cache_write(k, v, slots, 5, [kv_0[2], kv_0[3]])``.

    A policy with learned maps asks at which exit each token left (``kv_0(h_4, left, cos, sin)``),
    and its maps stand in front of the layers, too, for the masked-dense plan:
    ``add_9 = map_state(h_5, active, down, up, 0, [4])``, which layer 5 reads in place of ``h_5``.

    The same holds for index keys of sparse attention, and for the input of modules that keep
    recurrent state.

    Guarantees: what layer ``l`` writes gets its values from each exit point ``e <= l``.

    Refuses when: a layer's keys depend on an earlier layer by more than the residual stream.
    """

    needs = Stage.GATED
    reaches = Stage.SYNTHESIZED

    def call(self, work: Work) -> PassResult:
        """Builds one subgraph per exit point."""
        found = writes(work.graph.graph.nodes)
        counts = {"slices": 0, "cut": 0}
        tensors = _policy_tensors(work)
        modified = False
        for gate in work.find(_GATE):
            index: Any = gate.args[3]
            if hasattr(work.graph, f"kv_{index}"):
                continue
            behind = [w for w in found if (meta.get(w).layer or 0) >= work.exits[index]]
            counts["cut"] += self._synthesize(work, gate, index, behind, tensors)
            counts["slices"] += len(behind)
            modified = True
        if modified and tensors:
            counts["maps"] = _map_layers(work, tensors)
        return PassResult(modified, counts)

    def ensures(self, work: Work) -> None:
        """Each write lists, per exit point before it, what it is to write."""
        ends = [0] * len(work.exits)
        for write in writes(work.graph.graph.nodes):
            before = [i for i, e in enumerate(work.exits) if e <= (meta.get(write).layer or 0)]
            expected = []
            for index in before:
                expected += [(f"kv_{index}", ends[index] + at) for at in range(len(written(write)))]
                ends[index] += len(written(write))
            listed: list[Any] = synthesized(write)
            if [(item.args[0].target, item.args[1]) for item in listed] != expected:
                raise PassError(f"{slot(write)} lacks synthesized values")

    def _synthesize(
        self,
        work: Work,
        gate: Node,
        index: int,
        behind: list[Node],
        tensors: dict[str, Node],
    ) -> int:
        graph = work.graph.graph
        order = {node: position for position, node in enumerate(graph.nodes)}
        borders = {meta.get(n).border: n for n in graph.nodes if meta.get(n).border is not None}
        part = Extraction(work.symbols, merge=True)
        state = part.add_input(borders[work.exits[index]], "hidden")
        left = part.add_input(gate, "left") if tensors else state
        part.copy(tensors.values())
        outputs = []
        mapped: dict[int, Node] = {}
        for write in behind:
            layer = meta.get(write).layer or 0
            which = work.policy.which(layer)
            if which not in mapped:
                mapped[which] = work.policy.map_state(
                    state, left, which, lambda name: part.copies[tensors[name]]
                )
            part.copies[borders[layer]] = mapped[which]
            outputs += self._slice(part, write, borders[layer], layer, order)
        sources = list(part.sources)
        module = part.finish(outputs)
        cut = cut_unused_columns(module, work.symbols)
        merge_projections(module)
        work.graph.add_submodule(f"kv_{index}", module)
        self._connect(work, gate, index, part.inputs + sources, behind)
        return cut

    def _slice(
        self, part: Extraction, write: Node, border: Node, layer: int, order: dict[Node, int]
    ) -> list[Node]:
        wanted = written(write)
        prologue = _Prologue(border)
        nodes = needed(wanted, prologue, order, part.symbols)
        for node in reversed(nodes):
            if node.op == "call_module" or is_write(node):
                raise UnsupportedModelError(
                    f"{slot(write)} of layer {layer} depends on what the layer attends to",
                    hint="keys must follow from the residual stream and the positions alone",
                )
            if meta.get(node).layer not in (layer, None) and not is_scalar(node):
                raise UnsupportedModelError(
                    f"keys of layer {layer} depend on {node.name} of layer {meta.get(node).layer}",
                    hint="keys must follow from the residual stream and the positions alone",
                )
        for node in nodes:
            for i in node.all_input_nodes:
                if i in prologue and i not in part.copies and not part.is_own_size(i):
                    part.add_input(i)
        part.copy(nodes, _split_norm)
        return wanted

    def _connect(
        self, work: Work, gate: Node, index: int, inputs: list[Node], behind: list[Node]
    ) -> None:
        """Calls the subgraph at its gate and lists its outputs at the writes."""
        graph = work.graph.graph
        with graph.inserting_after(gate):
            call = graph.call_module(f"kv_{index}", tuple(inputs))
        values = [value for write in behind for value in written(write)]
        call.meta["val"] = tuple(value.meta["val"] for value in values)
        meta.update(call, layer=meta.get(gate).layer, exit=index)
        last, at = call, 0
        for write in behind:
            items = []
            for _ in written(write):
                with graph.inserting_after(last):
                    last = graph.call_function(operator.getitem, (call, at))
                last.meta.update({"val": call.meta["val"][at], meta.KEY: meta.get(call)})
                items.append(last)
                at += 1
            add_synthesized(write, items)


def _policy_tensors(work: Work) -> dict[str, Node]:
    """The maps' own tensors as inputs of the graph, like those of the model."""
    graph = work.graph.graph
    inputs = graph.find_nodes(op="placeholder")
    mode = detect_fake_mode([node.meta.get("val") for node in inputs])
    nodes: dict[str, Node] = {}
    for name, reference in work.policy.tensors().items():
        known = next((n for n in inputs if meta.get(n).source == reference.name), None)
        if known is None:
            if mode is None:
                raise PassError("the graph has no fake tensors")
            with graph.inserting_after(inputs[-1]):
                known = graph.placeholder(f"kv_map_{name}")
            known.meta["val"] = mode.from_tensor(reference.get())
            meta.update(known, source=reference.name)
            work.sources[known.name] = reference
        nodes[name] = known
    return nodes


def _map_layers(work: Work, tensors: dict[str, Node]) -> int:
    """Puts its map in front of every layer behind an exit point; returns how many."""
    graph = work.graph.graph
    gates = work.find(_GATE)
    borders = {b: n for n in graph.nodes if (b := meta.get(n).border) is not None}
    for layer in range(work.exits[0], work.num_layers):
        border = borders[layer]
        active = gates[sum(e <= layer for e in work.exits) - 1]
        readers = [user for user in border.users if not _passes_by(user)]
        with graph.inserting_after(active if active.args[0] is border else border):
            arguments = (border, active, *tensors.values(), work.policy.which(layer))
            node = graph.call_function(_MAP, (*arguments, list(work.exits)))
        node.meta["val"] = border.meta["val"]
        meta.update(node, layer=layer)
        for reader in readers:
            reader.replace_input_with(border, node)
    return work.num_layers - work.exits[0]


def _passes_by(user: Node) -> bool:
    """Whether a reader of the residual stream is no part of the layer behind it."""
    synthesis = user.op == "call_module" and str(user.target).startswith("kv_")
    return synthesis or user.target in (_GATE, _FREEZE)


def _split_norm(part: Extraction, node: Node) -> Node | None:
    """Takes a layer norm apart, so that the layers share its statistic.

    ``layer_norm(x, shape, weight, bias)`` becomes ``layer_norm(x, shape) * weight + bias``: the
    first factor is the same for all skipped layers. (Root mean square norms are traced in parts.)
    """
    if node.target is not _LAYER_NORM or len(node.args) < 3 or node.kwargs:
        return None
    defaults = (None, None, 1e-5)  # weight, bias, eps
    states, shape, weight, bias, eps = (*node.args, *defaults[len(node.args) - 2 :])[:5]
    if not isinstance(states, Node) or not isinstance(weight, Node):
        return None
    graph = part.graph
    plain = (part.lookup(states), shape, None, None, eps)
    result = part.number(graph.call_function(_LAYER_NORM, plain), node)
    result = graph.call_function(torch.ops.aten.mul.Tensor, (result, part.lookup(weight)))
    result.meta = dict(node.meta)
    if isinstance(bias, Node):
        result = graph.call_function(torch.ops.aten.add.Tensor, (result, part.lookup(bias)))
    return result


class _Prologue:
    """Where a slice stops: the layer's input, and tensors that no layer computes."""

    def __init__(self, border: Node) -> None:
        self.border = border

    def __contains__(self, node: object) -> bool:
        return node is self.border or (
            isinstance(node, Node) and meta.get(node).layer == PROLOGUE and not is_scalar(node)
        )
