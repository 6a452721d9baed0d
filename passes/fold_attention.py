"""Folds each layer's attention into one node."""

import operator

import torch
from torch import Tensor, fx
from torch.fx import Node

from adept_fx.errors import PassError, UnsupportedModelError
from adept_fx.graph import meta
from adept_fx.graph.base import Pass, PassResult, Stage, Work
from adept_fx.graph.extract import Extraction
from adept_fx.graph.symbols import free_symbols, is_scalar
from adept_fx.ops.attention import Attention

_WRITE = torch.ops.adept_fx.cache_write.default
_ATTENTION = torch.ops.adept_fx.attention.default


class FoldAttention(Pass):
    """Makes the part of a layer that sees cached keys one call.

    Only this part knows rows; everything else is token by token, which is why live tokens of all
    rows may be packed into one. It reaches from the cache write until the key length vanishes
    from the shapes, whether the model calls a registered attention function or computes attention
    itself.

    Before: ``k, v = cache_write(...); a = attention(q, k, v, mask)`` (or ``baddbmm`` ...).
    After: ``k, v = cache_write(...); a = attention_3(k, v, q, mask)``, a submodule.

    Guarantees: one region per cache write; outside of regions no value has a key length but masks.

    Refuses when: keys of one layer reach into another.
    """

    needs = Stage.HOISTED
    reaches = Stage.FOLDED

    def call(self, work: Work) -> PassResult:
        """Folds region after region."""
        writes = work.find(_WRITE)
        folded = [write for write in writes if self._fold(work, write)]
        work.graph.graph.eliminate_dead_code()
        return PassResult(bool(folded), {"regions": len(writes), "folded": len(folded)})

    def ensures(self, work: Work) -> None:
        """Checks that every write has its region and none leaks keys."""
        for write in work.find(_WRITE):
            readers = {user for item in write.users for user in item.users}
            if len(readers) != 1 or next(iter(readers)).op != "call_module":
                raise PassError(f"keys of cache layer {write.args[3]} are read outside its region")

    def _fold(self, work: Work, write: Node) -> bool:
        name = f"attention_{write.args[3]}"
        if hasattr(work.graph, name):
            return False
        keys, values = _unpack(work.graph.graph, write)
        region = _region(work, {keys, values})
        outputs = [
            node
            for node in region
            if not is_scalar(node) and any(user not in region for user in node.users)
        ]
        if any(meta.get(node).layer != meta.get(write).layer for node in region):
            raise UnsupportedModelError(
                f"cached keys of layer {write.args[3]} are read by another layer",
                hint="decoders that share keys and values between layers are not supported yet",
            )
        if len(outputs) != 1:
            raise PassError(f"attention of cache layer {write.args[3]} has outputs {outputs}")
        _replace(work, name, region, outputs[0], keys, values)
        return True


def _unpack(graph: fx.Graph, write: Node) -> tuple[Node, Node]:
    items = {user.args[1]: user for user in write.users if user.target is operator.getitem}
    pair = []
    for at in (0, 1):
        if at not in items:
            with graph.inserting_after(write):
                items[at] = graph.call_function(operator.getitem, (write, at))
            items[at].meta.update({"val": write.meta["val"][at], meta.KEY: meta.get(write)})
        pair.append(items[at])
    return pair[0], pair[1]


def _region(work: Work, start: set[Node]) -> dict[Node, None]:
    """All readers of the keys up to where the key length vanishes, in graph order."""
    symbols = work.symbols
    inside: dict[Node, None] = {}
    for node in work.graph.graph.nodes:
        if any(
            i in start or (i in inside and free_symbols(i.meta["val"]) & symbols.keys)
            for i in node.all_input_nodes
        ) and not (is_scalar(node) and not free_symbols(node.meta["val"]) & symbols.keys):
            inside[node] = None
    return inside


def _replace(
    work: Work, name: str, region: dict[Node, None], output: Node, keys: Node, values: Node
) -> None:
    graph = work.graph.graph
    part = Extraction(work.symbols, keys=True)
    part.add_input(keys, "keys")
    part.add_input(values, "values")
    query = next((n.args[0] for n in region if n.target is _ATTENTION), None)
    for node in region:
        for i in node.all_input_nodes:
            if i not in region and i not in part.copies and not part.is_own_size(i):
                part.add_input(i)
    part.copy(region)
    module = part.finish(output)
    _lower_calls(module, work)
    if isinstance(query, Node):
        work.queries[int(str(meta.get(keys).layer))] = part.inputs.index(query)
    work.graph.add_submodule(name, module)
    with graph.inserting_after(output):
        call = graph.call_module(name, tuple(part.inputs))
    call.meta.update({"val": output.meta["val"], meta.KEY: meta.get(output)})
    output.replace_all_uses_with(call, delete_user_cb=lambda user: user not in region)
    for node in reversed(region):
        graph.erase_node(node)


def _lower_calls(module: fx.GraphModule, work: Work) -> None:
    """Marker ops of registered attention become modules that call what was recorded."""
    for node in module.graph.find_nodes(op="call_function", target=_ATTENTION):
        index = node.args[5]
        if not isinstance(index, int) or not isinstance(node.meta["val"], Tensor):
            raise PassError(f"malformed attention marker {node.format_node()}")
        module.add_submodule("attention", Attention(work.attentions[index]))
        with module.graph.inserting_before(node):
            call = module.graph.call_module("attention", node.args[:5])
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    module.recompile()
