"""Builds the subgraphs that compute keys and values of skipped layers."""

import operator
from typing import Any

import torch
from torch.fx import Node

from adept_fx.errors import PassError, UnsupportedModelError
from adept_fx.graph import meta
from adept_fx.graph.base import Pass, PassResult, Stage, Work
from adept_fx.graph.extract import Extraction, needed
from adept_fx.graph.merge import merge_projections
from adept_fx.graph.meta import PROLOGUE
from adept_fx.graph.projections import cut_unused_columns
from adept_fx.graph.symbols import is_scalar

_GATE = torch.ops.adept_fx.gate.default
_LAYER_NORM = torch.ops.aten.layer_norm.default
_WRITE = torch.ops.adept_fx.cache_write.default


class SynthesizeKV(Pass):
    """Gives every exit point the keys and values that all skipped layers owe to later tokens.

    For each layer ``l >= e`` the backward slice from its cache write to its input is copied with
    the exit state ``h_e`` (behind the policy's KV map) in place of the input. All layers share
    one graph, in which equal expressions are computed once: the norm statistic, the rotary
    tables. Of a fused projection only the key and value columns are computed.

    Before: ``cache_write(k, v, slots, 5, [])``.
    After: ``kv_0 = kv_0(h_4, cos, sin)``, ``cache_write(k, v, slots, 5, [kv_0[2], kv_0[3]])``.

    Guarantees: layer ``l`` gets one key and one value from each exit point ``e <= l``.

    Refuses when: a layer's keys depend on an earlier layer by more than the residual stream.
    """

    needs = Stage.GATED
    reaches = Stage.SYNTHESIZED

    def call(self, work: Work) -> PassResult:
        """Builds one subgraph per exit point."""
        writes = {write.args[3]: write for write in work.find(_WRITE)}
        counts = {"slices": 0, "cut": 0}
        modified = False
        for gate in work.find(_GATE):
            index: Any = gate.args[3]
            if hasattr(work.graph, f"kv_{index}"):
                continue
            layers = range(work.exits[index], work.num_layers)
            counts["cut"] += self._synthesize(work, gate, index, layers, writes)
            counts["slices"] += len(layers)
            modified = True
        return PassResult(modified, counts)

    def ensures(self, work: Work) -> None:
        """Each write lists two tensors per exit point before it."""
        for write in work.find(_WRITE):
            layer: Any = write.args[3]
            listed: Any = write.args[4]
            expected = [
                (f"kv_{index}", 2 * (layer - e) + at)
                for index, e in enumerate(work.exits)
                if e <= layer
                for at in (0, 1)
            ]
            if [(item.args[0].target, item.args[1]) for item in listed] != expected:
                raise PassError(f"cache layer {layer} lacks synthesized keys and values")

    def _synthesize(
        self, work: Work, gate: Node, index: int, layers: range, writes: dict[Any, Node]
    ) -> int:
        graph = work.graph.graph
        order = {node: position for position, node in enumerate(graph.nodes)}
        borders = {meta.get(n).border: n for n in graph.nodes if meta.get(n).border is not None}
        part = Extraction(work.symbols, merge=True)
        state = part.add_input(borders[work.exits[index]], "hidden")
        outputs = []
        for layer in layers:
            part.copies[borders[layer]] = work.policy.map_state(state, index, layer)
            outputs += self._slice(part, writes[layer], borders[layer], layer, order)
        sources = list(part.sources)
        module = part.finish(outputs)
        cut = cut_unused_columns(module, work.symbols)
        merge_projections(module)
        work.graph.add_submodule(f"kv_{index}", module)
        self._connect(work, gate, index, part.inputs + sources, [writes[i] for i in layers])
        return cut

    def _slice(
        self, part: Extraction, write: Node, border: Node, layer: int, order: dict[Node, int]
    ) -> list[Node]:
        pair = [write.args[0], write.args[1]]
        if not all(isinstance(node, Node) for node in pair):
            raise PassError(f"malformed cache write {write.format_node()}")
        prologue = _Prologue(border)
        nodes = needed(pair, prologue, order, part.symbols)  # type: ignore[arg-type]
        for node in reversed(nodes):
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
        return pair  # type: ignore[return-value]

    def _connect(
        self, work: Work, gate: Node, index: int, inputs: list[Node], writes: list[Node]
    ) -> None:
        """Calls the subgraph at its gate and lists its outputs at the writes."""
        graph = work.graph.graph
        with graph.inserting_after(gate):
            call = graph.call_module(f"kv_{index}", tuple(inputs))
        values = [value for w in writes for value in (w.args[0], w.args[1])]
        call.meta["val"] = tuple(v.meta["val"] for v in values)  # type: ignore[union-attr]
        meta.update(call, layer=meta.get(gate).layer, exit=index)
        last = call
        for position, write in enumerate(writes):
            pair = []
            for at in (2 * position, 2 * position + 1):
                with graph.inserting_after(last):
                    last = graph.call_function(operator.getitem, (call, at))
                last.meta.update({"val": call.meta["val"][at], meta.KEY: meta.get(call)})
                pair.append(last)
            write.update_arg(4, [*write.args[4], *pair])  # type: ignore[misc]


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
