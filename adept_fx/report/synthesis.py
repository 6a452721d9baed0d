"""Reads off an exit point's KV graph what it computes, and how."""

from collections import defaultdict
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from adept_fx.graph import meta
from adept_fx.graph.blocks import Synthesis
from adept_fx.graph.kv_projections import KVProjection, kv_projections, without_numbers
from adept_fx.ops.project import project_heads, project_layers, project_stacked
from adept_fx.report import facts
from adept_fx.report.layers import heads_and_width, outputs
from adept_fx.report.weights import tensors, used, used_columns

_aten = torch.ops.aten
_LINEAR = _aten.linear.default
# Calls that multiply by a weight, and the place of the states among their arguments.
_STATES: dict[Any, int] = {
    _LINEAR: 0,
    _aten.addmm.default: 1,
    _aten.mm.default: 0,
    _aten.matmul.default: 0,
    F.linear: 0,
    project_heads: 0,
    project_layers: 0,
    project_stacked: 0,
}
_FORMS: dict[Any, str] = {
    project_heads: "cut",
    project_layers: "merged",
    project_stacked: "stacked",
}
_KINDS = {"kv": "key_value", "indexer": "index_key", "mixer": "mixer_input"}


def slots(block: Synthesis, writer: dict[str, int]) -> tuple[facts.Slot, ...]:
    """What each skipped layer is owed.

    Args:
        block: The exit point's synthesis.
        writer: The layer that writes each slot.
    """
    values = iter(outputs(block))
    return tuple(
        facts.Slot(
            writer[slot],
            _KINDS[slot.rpartition("_")[0]],
            tuple(heads_and_width(value) for value in islice(values, count)),
        )
        for slot, count in block.slots.items()
    )


def nodes(block: Synthesis) -> int:
    """Number of operations."""
    return sum(node.op == "call_function" for node in block.graph.graph.nodes)


def projections(block: Synthesis) -> tuple[facts.Projection, ...]:
    """How the layers' projections are computed."""
    products: dict[str, dict[Node, Node]] = defaultdict(dict)
    for weight in tensors(block):
        product = _product(weight)
        if product is not None:
            products[without_numbers(meta.get(weight).source or "")][weight] = product
    return tuple(
        _projection(item, products[item.weight], block)
        for item in kv_projections(block.graph.graph)
    )


def _product(weight: Node) -> Node | None:
    """The nearest call that multiplies by a weight, behind views and casts of it."""
    readers = [weight]
    for reader in readers:
        if reader.target in _STATES:
            return reader
        readers += [user for user in reader.users if user not in readers]
    return None


def _projection(
    item: KVProjection, products: dict[Node, Node], block: Synthesis
) -> facts.Projection:
    """Of all layers' products with weights of one name, those of one form."""
    mine = {w: product for w, product in products.items() if _form(w, product) == item.form}
    mine = mine or products  # a weight that is read as a whole and in parts
    found = [_columns(weight, product) for weight, product in mine.items()]
    computed, columns = max(found, key=lambda pair: pair[1])  # should the layers differ
    return facts.Projection(
        weight=item.weight,
        layers=item.layers,
        form=item.form,
        computed=computed,
        columns=columns,
        reason=item.note or _reason(item, mine, products, block),
    )


def _form(weight: Node, product: Node) -> str:
    if product.target in _FORMS:
        return _FORMS[product.target]
    return "plain" if used_columns(weight)[0] is None else "cut"


def _columns(weight: Node, product: Node) -> tuple[int, int]:
    """Output columns that are computed, and that there are, whichever axis holds them."""
    states: Any = product.args[_STATES[product.target]]
    first = states[0] if isinstance(states, (list, tuple)) else states
    layers = weight.meta["val"].shape[0] if product.target is project_stacked else 1
    rows = int(first.meta["val"].shape[-1]) * layers
    return used(weight) // rows, weight.meta["val"].numel() // rows


def _reason(
    item: KVProjection, mine: dict[Node, Node], products: dict[Node, Node], block: Synthesis
) -> str:
    """Why projections are not merged, or will not be one product when they are."""
    if item.form == "merged":
        known = tensors(block)
        kinds = {type(known[weight]).__name__ for weight in mine} - {nn.Parameter.__name__}
        return f"{', '.join(sorted(kinds))} keeps its own layout" if kinds else ""
    if item.form == "cut":
        return "a part of a weight cannot be merged"
    return _why_plain(mine, products) if item.form == "plain" else ""


def _why_plain(mine: dict[Node, Node], products: dict[Node, Node]) -> str:
    """The condition of ``merge_projections`` that does not hold."""
    other = {str(p.target) for p in mine.values() if p.target is not _LINEAR}
    if other:
        return f"only linear is merged, not {', '.join(sorted(other))}"
    if len(products) == 1:
        return "no other layer has one"
    own = [meta.get(i).source for p in mine.values() for i in p.args[1:] if isinstance(i, Node)]
    if None in own:
        return "weight or bias is computed in the forward"
    values = [weight.meta["val"] for weight in products]
    if len({(tuple(value.shape), value.dtype) for value in values}) > 1:
        return "the layers' weights differ in shape or dtype"
    return "one layer's depends on another's"
