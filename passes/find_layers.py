"""Finds the layers, and the residual state between them, by dataflow."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.fx import Node

from adept_fx.errors import PassError, UnsupportedModelError
from adept_fx.graph import meta
from adept_fx.graph.base import Pass, PassResult, Stage, Work
from adept_fx.graph.meta import PROLOGUE
from adept_fx.graph.symbols import is_hidden, is_own_size, is_scalar


class FindLayers(Pass):
    """Marks every node with its layer, and the residual state at every layer border.

    The *chain* is what every path from ``inputs_embeds`` to the output goes through (the
    post-dominators of the embedding). Layer ``l`` owns the parameters that share the position of
    those behind cache write ``l`` (``layers.3.``, ``h.3.`` ...). The state after layer ``l`` is
    the first element of the chain that depends on every use of a parameter of layer ``l``.

    Before: a flat graph. After: the same graph, with ``NodeMeta.layer`` on every node and
    ``NodeMeta.border`` on ``L + 1`` of them.

    Guarantees: borders are single ``[B, S, D]`` values, in order; every cache write of layer
    ``l`` depends on border ``l``.

    Refuses when: the layers share their parameters, or no single value separates two layers.
    """

    needs = Stage.NORMALIZED
    reaches = Stage.LAYERED

    def call(self, work: Work) -> PassResult:
        """Annotates nodes; changes no computation."""
        flow = _Flow.trace(work)
        container = _layer_container(work)
        uses = _parameter_uses(work, container, flow)
        borders = _borders(flow, uses, work)
        modified = _annotate(work, flow, borders)
        work.num_layers = len(borders) - 1
        return PassResult(modified, {"layers": work.num_layers, "chain": len(flow.chain)})

    def ensures(self, work: Work) -> None:
        """Checks the borders' shapes and the writes' places."""
        found = [node for node in work.graph.graph.nodes if meta.get(node).border is not None]
        if [meta.get(node).border for node in found] != list(range(work.num_layers + 1)):
            raise PassError(f"layer borders out of order: {found}")
        for write in work.find(torch.ops.adept_fx.cache_write.default):
            if meta.get(write).layer != write.args[3]:
                raise PassError(
                    f"cache layer {write.args[3]} is written in layer {meta.get(write).layer}"
                )


@dataclass
class _Flow:
    """Dataflow from the embedding to the output.

    ``place[n]`` is the index of ``n`` in the chain, or the last index before it plus one half.
    """

    chain: list[Node]
    place: dict[Node, float]

    @staticmethod
    def trace(work: Work) -> "_Flow":
        graph = work.graph.graph
        source = next(n for n in graph.find_nodes(op="placeholder") if n.name == "inputs_embeds")
        sink = graph.output_node()
        order = {node: position for position, node in enumerate(graph.nodes)}
        reached = _reached(source, sink, order)
        chain, horizon = [], 0
        for node in reached:
            if horizon <= order[node] and node is not sink:
                chain.append(node)
            horizon = max([horizon, *(order[user] for user in node.users if user in reached)])
        return _Flow(chain, _places(chain, order, work))

    def following(self, node: Node) -> int:
        """Index of the first chain element at or after ``node``."""
        return int(-(-self.place[node] // 1))


def _reached(source: Node, sink: Node, order: dict[Node, int]) -> dict[Node, None]:
    """Nodes on a path from source to sink, in order; sizes carry no dataflow."""
    forward = {source}
    for node in order:
        if not is_scalar(node) and any(i in forward for i in node.all_input_nodes):
            forward.add(node)
    backward = {sink}
    for node in reversed(order):
        if node in forward and any(user in backward for user in node.users):
            backward.add(node)
    return {node: None for node in order if node in backward}


def _places(chain: list[Node], order: dict[Node, int], work: Work) -> dict[Node, float]:
    index = {node: position for position, node in enumerate(chain)}
    place: dict[Node, float] = {}
    for node in order:
        if is_own_size(node, work.symbols):
            continue
        before = [place[i] for i in node.all_input_nodes if i in place]
        if node in index:
            place[node] = float(index[node])
        elif before:
            place[node] = max(before) // 1 + 0.5
    return place


def _layer_container(work: Work) -> str:
    """The path of the module list that holds the layers, e.g. ``layers``.

    Two cache writes have parameters behind them whose names differ in one number only.
    """
    writes = work.find(torch.ops.adept_fx.cache_write.default)
    names = [_sources_behind(write) for write in writes]
    for first, second in pairwise(names):
        known = {name: name.split(".") for name in first}
        for name in second:
            if name in known:
                continue
            for parts in known.values():
                at = _one_number_apart(parts, name.split("."))
                if at is not None:
                    return ".".join(parts[:at])
    raise UnsupportedModelError(
        "cannot tell the decoder's layers apart: no parameter belongs to one of them alone",
        hint="the decoder needs two or more layers with parameters of their own",
    )


def _sources_behind(write: Node) -> list[str]:
    """Names of the model's tensors behind a cache write, nearest first."""
    queue, seen, names = list(write.args[:2]), set(), []
    for node in queue:
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        source = meta.get(node).source
        if source is not None:
            names.append(source)
        queue.extend(node.all_input_nodes)
    return names


def _one_number_apart(left: list[str], right: list[str]) -> int | None:
    if len(left) != len(right):
        return None
    differ = [at for at, (a, b) in enumerate(zip(left, right, strict=True)) if a != b]
    numbers = len(differ) == 1 and left[differ[0]].isdigit() and right[differ[0]].isdigit()
    return differ[0] if numbers else None


def _parameter_uses(work: Work, container: str, flow: _Flow) -> dict[int, list[Node]]:
    """Per layer, the nodes of the stream that read one of its parameters."""
    owner: dict[Node, int] = {}
    uses: dict[int, list[Node]] = defaultdict(list)
    prefix = f"{container}." if container else ""
    for node in work.graph.graph.nodes:
        source = meta.get(node).source
        if source is not None:
            head = source.removeprefix(prefix).split(".")[0]
            if source.startswith(prefix) and head.isdigit():
                owner[node] = int(head)
            continue
        layers = {owner[i] for i in node.all_input_nodes if i in owner}
        if node in flow.place:
            for layer in layers:
                uses[layer].append(node)
        elif len(layers) == 1:
            owner[node] = layers.pop()
    return uses


def _borders(flow: _Flow, uses: dict[int, list[Node]], work: Work) -> list[Node]:
    count = len(uses)
    if sorted(uses) != list(range(count)):
        raise UnsupportedModelError(f"the decoder's layers are numbered {sorted(uses)}, not 0..L-1")
    places = [max(0, min(flow.following(node) for node in uses[0]) - 1)]
    for layer in range(count):
        after = max(flow.following(node) for node in uses[layer])
        while after < len(flow.chain) and not is_hidden(flow.chain[after], work.symbols):
            after += 1  # outputs of split ops, or a state that is reshaped before it goes on
        early = [node for node in uses[layer] if flow.place[node] <= places[-1] and layer]
        if after >= len(flow.chain) or early or after <= places[-1]:
            raise _no_cut(layer if early else layer + 1, flow, after)
        places.append(after)
    return [flow.chain[place] for place in places]


def _no_cut(index: int, flow: _Flow, near: int) -> UnsupportedModelError:
    candidates = [node.name for node in flow.chain[max(0, near - 3) : near + 3]]
    return UnsupportedModelError(
        f"no single value of shape [batch, tokens, hidden] separates layer {index - 1} from "
        f"layer {index}; candidates on the residual stream: {', '.join(candidates) or 'none'}",
        hint="the residual stream must be one value between two layers",
    )


def _annotate(work: Work, flow: _Flow, borders: list[Node]) -> bool:
    limits = [flow.place[node] for node in borders[1:]]
    changed = False
    inputs: set[Node] = set()
    for node in work.graph.graph.nodes:
        facts = meta.get(node)
        if is_own_size(node, work.symbols):
            layer: int | None = None
        elif node in flow.place:
            layer = sum(limit < flow.place[node] for limit in limits)
        elif (node.op == "placeholder" and facts.source is None) or any(
            i in inputs for i in node.all_input_nodes
        ):
            # Also what counts cached tokens or keys: it must not be computed from compacted sizes.
            inputs.add(node)
            layer = PROLOGUE
        else:
            layer = None
        border = borders.index(node) if node in borders else None
        changed |= (facts.layer, facts.border) != (layer, border)
        meta.update(node, layer=layer, border=border)
    return changed
