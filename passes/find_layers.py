"""Finds the layers, and the residual state between them, by dataflow."""

from collections import defaultdict
from itertools import pairwise

from torch.fx import Node

from adept_fx.errors import PassError, UnsupportedModelError
from adept_fx.graph import meta
from adept_fx.graph.base import Pass, PassResult, Stage, Work
from adept_fx.graph.flow import Flow
from adept_fx.graph.meta import PROLOGUE
from adept_fx.graph.symbols import ancestors, is_hidden, is_own_size, is_scalar
from adept_fx.graph.writes import MIXER, data_inputs, slot, writes


class FindLayers(Pass):
    """Marks every node with its layer, and the residual state at every layer border.

    The *chain* is what every path from ``inputs_embeds`` to the output goes through (the
    post-dominators of the embedding), values beside the residual stream left out of account.
    Layer ``l`` owns the parameters that share the position of those behind its cache write
    (``layers.3.``, ``h.3.`` ...). The state after layer ``l`` is the first element of the chain
    that depends on every use of a parameter of layer ``l``.

    Before: a flat graph. After: the same graph, with ``NodeMeta.layer`` on every node and
    ``NodeMeta.border`` on ``L + 1`` of them.

    Guarantees: borders are single ``[B, S, D]`` values, in order; every cache write lies in a
    layer, between its borders.

    Refuses when: the layers share their parameters, or no single value separates two layers.
    """

    needs = Stage.NORMALIZED
    reaches = Stage.LAYERED

    def call(self, work: Work) -> PassResult:
        """Annotates nodes; changes no computation."""
        container = _layer_container(work)
        layer_of = _parameter_uses(work, container)
        flow = Flow.trace(work, layer_of)
        borders = _borders(flow, layer_of, work)
        modified = _annotate(work, flow, borders)
        work.num_layers, work.container = len(borders) - 1, container
        return PassResult(modified, {"layers": work.num_layers, "chain": len(flow.chain)})

    def ensures(self, work: Work) -> None:
        """Checks the borders' shapes and the writes' places."""
        found = [node for node in work.graph.graph.nodes if meta.get(node).border is not None]
        if [meta.get(node).border for node in found] != list(range(work.num_layers + 1)):
            raise PassError(f"layer borders out of order: {found}")
        _check_places(work)


def _check_places(work: Work) -> None:
    """Nothing that a layer writes depends on a later border; no earlier border depends on it."""
    last: dict[Node, int] = {}
    for node in work.graph.graph.nodes:
        border = meta.get(node).border
        found = [last[i] for i in node.all_input_nodes if i in last]
        last[node] = max(-1 if border is None else border, *found, -1)
    next_one: dict[Node, int] = {}
    for node in reversed(work.graph.graph.nodes):
        border = meta.get(node).border
        found = [next_one[user] for user in node.users]
        beyond = work.num_layers + 1
        next_one[node] = min(beyond if border is None else border, *found, beyond)
    for write in writes(work.graph.graph.nodes):
        layer = meta.get(write).layer
        if layer is None or not 0 <= layer < work.num_layers:
            raise PassError(f"{slot(write)} is written outside of the layers")
        if last[write] > layer or next_one[write] <= layer:
            raise PassError(f"{slot(write)} is not written in layer {layer}")


def _layer_container(work: Work) -> str:
    """The path of the module list that holds the layers, e.g. ``layers``.

    Two cache writes have parameters (or mixers) behind them whose names differ in one number only.
    """
    names = [_sources_behind(work, write) for write in writes(work.graph.graph.nodes)]
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


def _sources_behind(work: Work, write: Node) -> list[str]:
    """Names of the model's tensors, and of mixers, behind a cache write, nearest first."""
    queue, seen, names = [write], set(), []
    for node in queue:
        if node in seen:
            continue
        seen.add(node)
        name = meta.get(node).source or _mixer_name(work, node)
        if name:
            names.append(name)
        queue.extend(data_inputs(node))
    return names


def _one_number_apart(left: list[str], right: list[str]) -> int | None:
    if len(left) != len(right):
        return None
    differ = [at for at, (a, b) in enumerate(zip(left, right, strict=True)) if a != b]
    numbers = len(differ) == 1 and left[differ[0]].isdigit() and right[differ[0]].isdigit()
    return differ[0] if numbers else None


def _parameter_uses(work: Work, container: str) -> dict[Node, int]:
    """The layer of each node of the stream that reads a parameter of one."""
    owner: dict[Node, int] = {}
    layer_of: dict[Node, int] = {}
    stream = _downstream(work)
    for node in work.graph.graph.nodes:
        layer = _position(meta.get(node).source or _mixer_name(work, node), container)
        layers = {owner[i] for i in node.all_input_nodes if i in owner}
        layers |= set() if layer is None else {layer}
        if node in stream and layers:
            layer_of[node] = max(layers)
        elif len(layers) == 1:
            owner[node] = layers.pop()
    return layer_of


def _downstream(work: Work) -> set[Node]:
    found: set[Node] = set()
    for node in work.graph.graph.nodes:
        reads = node.name == "inputs_embeds" or any(i in found for i in node.all_input_nodes)
        if reads and not is_scalar(node):
            found.add(node)
    return found


def _mixer_name(work: Work, node: Node) -> str:
    at = node.args[4] if node.target is MIXER else None
    return work.mixers[at].name if isinstance(at, int) else ""


def _position(name: str, container: str) -> int | None:
    """The number of the layer that a parameter or module belongs to."""
    prefix = f"{container}." if container else ""
    head = name.removeprefix(prefix).split(".")[0]
    return int(head) if name.startswith(prefix) and head.isdigit() else None


def _borders(flow: Flow, layer_of: dict[Node, int], work: Work) -> list[Node]:
    uses: dict[int, list[Node]] = defaultdict(list)
    for node, layer in layer_of.items():
        uses[layer].append(node)
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


def _no_cut(index: int, flow: Flow, near: int) -> UnsupportedModelError:
    candidates = [node.name for node in flow.chain[max(0, near - 3) : near + 3]]
    return UnsupportedModelError(
        f"no single value of shape [batch, tokens, hidden] separates layer {index - 1} from "
        f"layer {index}; candidates on the residual stream: {', '.join(candidates) or 'none'}",
        hint="the residual stream must be one value between two layers",
    )


def _annotate(work: Work, flow: Flow, borders: list[Node]) -> bool:
    limits = [flow.place[node] for node in borders[1:]]
    early = {n for n in ancestors(flow.side) if n.op != "placeholder" and n in flow.place}
    changed = False
    inputs: set[Node] = set()
    for node in work.graph.graph.nodes:
        facts = meta.get(node)
        if is_own_size(node, work.symbols):
            layer: int | None = None
        elif node in early:
            layer = PROLOGUE
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
