"""Drops what only the capture needed and names the graph's inputs."""

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.fx import Node

from adept_fx.errors import PassError
from adept_fx.graph.base import Pass, PassResult, Stage, Work
from adept_fx.graph.symbols import expression

_aten = torch.ops.aten
_CASTS = {
    _aten.to.dtype,
    _aten.to.dtype_layout,
    _aten.to.device,
    _aten.to.other,
    _aten._to_copy.default,
    _aten.type_as.default,
}
_DROPOUTS = {_aten.dropout.default: 2, _aten.feature_dropout.default: 2}
_ASSERTIONS = {
    _aten._assert_tensor_metadata.default,
    _aten._assert_scalar.default,
    _aten._assert_async.msg,
    _aten.sym_constrain_range_for_size.default,
    _aten.sym_constrain_range.default,
}


class Normalize(Pass):
    """Leaves only what computes values, with the graph's inputs made explicit.

    Before: ``embed(embedding(weight, input_ids))``, ``mask(...)``, assertions, no-op casts.
    After: placeholders ``inputs_embeds`` and ``mask_<i>_<kind>``; no assertion, no cast or slice
    that does nothing, no dropout in eval mode; ``view`` is ``reshape``, since a compacted value may
    have other strides.

    Guarantees: no assertion nodes, no no-op casts and slices, no in-place ops, no dead nodes, one
    ``inputs_embeds``.
    """

    needs = Stage.CAPTURED
    reaches = Stage.NORMALIZED

    def call(self, work: Work) -> PassResult:
        """Runs the rewrites, cheapest first."""
        graph = work.graph.graph
        counts = {
            "assertions": _erase(graph, lambda node: node.target in _ASSERTIONS),
            "casts": _bypass(graph, _is_noop_cast),
            "dropouts": _bypass(graph, _is_noop_dropout),
            "slices": _bypass(graph, _is_noop_slice),
            "views": _views_to_reshapes(graph),
            "inputs": _embedding_to_input(graph) + _masks_to_inputs(graph, work),
            "sizes": _sizes_of_input(graph, work),
        }
        counts["dead"] = _drop_dead(graph)
        return PassResult(modified=any(counts.values()), counts=counts)

    def ensures(self, work: Work) -> None:
        """Checks each guarantee."""
        for node in work.graph.graph.nodes:
            if node.target in _ASSERTIONS or _is_noop_cast(node) or _is_noop_slice(node):
                raise PassError(f"normalize left {node.format_node()}")
            if node.op != "output" and not node.users:
                kind = "input" if node.op == "placeholder" else "node"
                raise PassError(f"normalize left the unused {kind} {node.name}")
            if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
                raise PassError(f"the captured graph writes in place: {node.format_node()}")


def _erase(graph: fx.Graph, matches: Callable[[Node], bool]) -> int:
    found = [node for node in graph.nodes if matches(node)]
    for node in reversed(found):
        graph.erase_node(node)
    return len(found)


def _bypass(graph: fx.Graph, matches: Callable[[Node], bool]) -> int:
    found = [node for node in graph.nodes if matches(node)]
    for node in found:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    return len(found)


def _is_noop_cast(node: Node) -> bool:
    if node.target not in _CASTS or not isinstance(node.args[0], Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    return (
        isinstance(before, Tensor)
        and isinstance(after, Tensor)
        and before.dtype == after.dtype
        and before.device == after.device
    )


def _is_noop_dropout(node: Node) -> bool:
    at = _DROPOUTS.get(node.target)  # type: ignore[call-overload]
    return at is not None and (node.args[at] is False or bool(node.args[1] == 0.0))


def _is_noop_slice(node: Node) -> bool:
    """Whether a slice is all of its input. Of a mask it must go: masks may be None in a call."""
    if node.target is not _aten.slice.Tensor or node.kwargs:
        return False
    start, _, step = (*node.args[2:], None, None, None)[:3]
    if start not in (None, 0) or step not in (None, 1):
        return False
    before, after = (i.meta.get("val") for i in (*node.all_input_nodes[:1], node))
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return [expression(size) for size in before.shape] == [expression(s) for s in after.shape]


def _views_to_reshapes(graph: fx.Graph) -> int:
    views = [
        node
        for node in graph.nodes
        if node.target in (_aten.view.default, _aten._unsafe_view.default)
    ]
    for node in views:
        node.target = _aten.reshape.default
    return len(views)


def _add_input(graph: fx.Graph, name: str, like: Node) -> Node:
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        created = graph.placeholder(name)
    created.meta.update({"val": like.meta["val"]})
    like.replace_all_uses_with(created)
    graph.erase_node(like)
    return created


def _embedding_to_input(graph: fx.Graph) -> int:
    marks = graph.find_nodes(op="call_function", target=torch.ops.adept_fx.embed.default)
    for mark in marks:
        _add_input(graph, "inputs_embeds", mark)
    return len(marks)


def mask_input(index: int, key: str) -> str:
    """The name of the graph input for a recorded mask."""
    return f"mask_{index}_{key}"


def _masks_to_inputs(graph: fx.Graph, work: Work) -> int:
    marks = [(mark, mark.args[2]) for mark in work.find(torch.ops.adept_fx.mask.default)]
    marks += [(mark, mark.args[1]) for mark in work.find(torch.ops.adept_fx.token_mask.default)]
    for mark, index in marks:
        if not isinstance(index, int):
            raise PassError(f"malformed mask marker {mark.format_node()}")
        _add_input(graph, mask_input(index, work.masks[index].key), mark)
    return len(marks)


def _sizes_of_input(graph: fx.Graph, work: Work) -> int:
    """Reads batch and token count off ``inputs_embeds``, wherever the model read them off."""
    embeds = next(n for n in graph.find_nodes(op="placeholder") if n.name == "inputs_embeds")
    names = {work.symbols.batch: 0, work.symbols.tokens: 1}
    found = [
        (node, names[expression(node.meta["val"])])
        for node in graph.find_nodes(op="call_function", target=_aten.sym_size.int)
        if expression(node.meta["val"]) in names and node.args[0] is not embeds
    ]
    last = graph.find_nodes(op="placeholder")[-1]
    for node, axis in found:
        with graph.inserting_after(last):
            size = graph.call_function(_aten.sym_size.int, (embeds, axis))
        size.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(size)
        graph.erase_node(node)
    return len(found)


def _drop_dead(graph: fx.Graph) -> int:
    before = len(graph.nodes)
    graph.eliminate_dead_code()
    for node in graph.find_nodes(op="placeholder"):
        if not node.users:
            graph.erase_node(node)
    return before - len(graph.nodes)
