"""Folds each layer's attention into one node."""

import operator
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from adept_fx.errors import PassError, UnsupportedModelError
from adept_fx.graph import meta
from adept_fx.graph.base import Pass, PassResult, Stage, Work
from adept_fx.graph.extract import Extraction
from adept_fx.graph.meta import PROLOGUE
from adept_fx.graph.symbols import free_symbols, is_scalar
from adept_fx.graph.writes import (
    INDEX,
    MIXER,
    WRITE,
    cache_write,
    is_cached,
    is_write,
    slot,
    writes,
)
from adept_fx.ops.attention import Attention

_ATTENTION = torch.ops.adept_fx.attention.default


class FoldAttention(Pass):
    """Makes the part of a layer that sees cached keys one call.

    Only this part knows rows; everything else is token by token, which is why live tokens of all
    rows may be packed into one. It reaches from the cache write until the key length vanishes
    from the shapes, whether the model calls a registered attention function or computes attention
    itself. A layer that attends to keys of an earlier layer has such a part, too.

    Before: ``k, v = cache_write(...); a = attention(q, k, v, mask)`` (or ``baddbmm`` ...).
    After: ``k, v = cache_write(...); a = attention_3(k, v, q, mask)``, a submodule.

    Guarantees: cached keys are read by regions alone; no two regions of a layer read the same
    ones; outside of regions no value has a key length but masks and the like, which come from
    before the layers.

    Refuses when: a layer makes a value as long as the keys of anything but cached keys.
    """

    needs = Stage.HOISTED
    reaches = Stage.FOLDED

    def call(self, work: Work) -> PassResult:
        """Folds region after region."""
        found = [n for n in writes(work.graph.graph.nodes) if n.target is not MIXER]
        for write in found:
            _unpack(work.graph.graph, write)
        regions = _regions(work, found)
        for region in regions:
            _replace(work, region)
        work.graph.graph.eliminate_dead_code()
        _refuse_long_values(work)
        return PassResult(bool(regions), {"writes": len(found), "folded": len(regions)})

    def ensures(self, work: Work) -> None:
        """Checks who reads cached keys, and that key lengths end with the regions."""
        for write in writes(work.graph.graph.nodes):
            _check_readers(write)
        for node in _long_values(work):
            raise PassError(f"{node.name} has a key length outside of a region")


def _long_values(work: Work) -> list[Node]:
    """Values of layers that have a key length and belong to no region."""
    return [
        node
        for node in work.graph.graph.nodes
        if meta.get(node).layer not in (None, PROLOGUE)
        and not is_scalar(node)
        and free_symbols(node.meta.get("val")) & work.symbols.keys
        and not is_write(node)
        and not is_cached(node)
    ]


def _refuse_long_values(work: Work) -> None:
    for node in _long_values(work):
        raise UnsupportedModelError(
            f"{node.name} of layer {meta.get(node).layer} is as long as the keys, but does not "
            "come from cached keys",
            hint="only what is read from the cache, and masks, may be as long as the keys",
        )


def _check_readers(write: Node) -> None:
    regions: dict[int | None, Node] = {}
    for item in cached_items(write) if write.target is not MIXER else ():
        for user in item.users:
            if user.op != "call_module":
                raise PassError(f"{slot(write)} is read outside of a region, by {user.name}")
            if regions.setdefault(meta.get(user).layer, user) is not user:
                raise PassError(f"two regions of layer {meta.get(user).layer} read {slot(write)}")


def cached_items(write: Node) -> list[Node]:
    """The nodes that stand for all keys (and values) of a cache layer."""
    if write.target is INDEX:
        return [write]
    return [user for user in write.users if user.target is operator.getitem]


def _unpack(graph: fx.Graph, write: Node) -> None:
    """Gives keys and values a node each."""
    present = {user.args[1] for user in cached_items(write) if write.target is WRITE}
    for at in {0, 1} - present if write.target is WRITE else ():
        with graph.inserting_after(write):
            item = graph.call_function(operator.getitem, (write, at))
        item.meta.update({"val": write.meta["val"][at], meta.KEY: meta.get(write)})


def _regions(work: Work, found: list[Node]) -> list[list[Node]]:
    """Per layer, groups of nodes that see the same cached keys, in graph order."""
    cached = {item: {write} for write in found for item in cached_items(write)}
    seen: dict[Node, set[Node]] = {}
    for node in work.graph.graph.nodes:
        long = bool(free_symbols(node.meta.get("val")) & work.symbols.keys)
        behind = [cached[i] for i in node.all_input_nodes if i in cached]
        if (
            node in cached
            or node.op == "call_module"
            or not behind
            or (is_scalar(node) and not long)
        ):
            continue
        seen[node] = set().union(*behind)
        if long:
            cached[node] = seen[node]
    groups: list[tuple[Any, set[Node], list[Node]]] = []
    for node, writes_seen in seen.items():
        layer = meta.get(node).layer
        near = [g for g in groups if g[0] == layer and g[1] & writes_seen]
        groups = [g for g in groups if g not in near]
        members = [member for g in near for member in g[2]]
        groups.append((layer, writes_seen.union(*(g[1] for g in near)), [*members, node]))
    order = {node: at for at, node in enumerate(seen)}
    return [sorted(members, key=order.__getitem__) for _, _, members in groups]


def _replace(work: Work, region: list[Node]) -> None:
    """Puts one call in the place of a region."""
    graph = work.graph.graph
    inside = set(region)
    part = Extraction(work.symbols, keys=True)
    reads = dict.fromkeys(i for node in region for i in node.all_input_nodes if i not in inside)
    # Cached keys first: the sizes of cached rows and keys are read off the first inputs.
    for i in sorted(reads, key=_rank):
        if not part.is_own_size(i):
            part.add_input(i)
    query = next((n.args[0] for n in region if n.target is _ATTENTION), None)
    outputs = [n for n in region if not is_scalar(n) and any(u not in inside for u in n.users)]
    layer = meta.get(region[0]).layer
    if not outputs or layer is None:
        raise PassError(f"cached keys are read by {region}, which leads nowhere")
    part.copy(region)
    module = part.finish(outputs[0] if len(outputs) == 1 else tuple(outputs))
    _lower_calls(module, work)
    name = _free_name(work.graph, f"attention_{layer}")
    if isinstance(query, Node) and query in part.inputs:
        work.queries[layer] = name, part.inputs.index(query)
    work.graph.add_submodule(name, module)
    with graph.inserting_after(region[-1]):
        call = graph.call_module(name, tuple(part.inputs))
    call.meta["val"] = tuple(n.meta["val"] for n in outputs)
    meta.update(call, layer=layer)
    _connect(graph, call, outputs, inside)
    for node in reversed(region):
        graph.erase_node(node)


def _rank(node: Node) -> int:
    """Cached keys come before index keys, those before the rest."""
    kinds = (WRITE, INDEX)
    return kinds.index(cache_write(node).target) if is_cached(node) else len(kinds)


def _free_name(module: fx.GraphModule, name: str) -> str:
    names = chain([name], (f"{name}_{at}" for at in count(1)))
    return next(found for found in names if not hasattr(module, found))


def _connect(graph: fx.Graph, call: Node, outputs: list[Node], inside: set[Node]) -> None:
    """Makes readers of the region's outputs read the call's."""
    after = call
    for at, output in enumerate(outputs):
        item = call
        if len(outputs) == 1:
            call.meta["val"] = output.meta["val"]
        else:
            with graph.inserting_after(after):
                after = item = graph.call_function(operator.getitem, (call, at))
            item.meta.update({"val": output.meta["val"], meta.KEY: meta.get(output)})
        output.replace_all_uses_with(item, delete_user_cb=lambda user: user not in inside)


def _lower_calls(module: fx.GraphModule, work: Work) -> None:
    """Marker ops of registered attention become modules that call what was recorded."""
    for node in module.graph.find_nodes(op="call_function", target=_ATTENTION):
        index = node.args[5]
        if not isinstance(index, int) or not isinstance(node.meta["val"], Tensor):
            raise PassError(f"malformed attention marker {node.format_node()}")
        name = _free_name(module, "attention")
        module.add_submodule(name, Attention(work.attentions[index]))
        with module.graph.inserting_before(node):
            call = module.graph.call_module(name, node.args[:5])
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    module.recompile()
