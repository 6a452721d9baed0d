"""One verifier per stage: what must hold of a graph from that stage on."""

from collections.abc import Callable

import torch
from torch.fx import Node

from adept_fx.errors import PassError
from adept_fx.graph import meta
from adept_fx.graph.base import Stage, Work
from adept_fx.graph.symbols import is_hidden
from adept_fx.graph.writes import writes


def verify(work: Work) -> None:
    """Checks everything that holds at ``work.stage``.

    Raises:
        PassError: Something does not hold.
    """
    if work.stage >= Stage.COMPACTED:
        _compacted(work)
        return
    for stage, check in _CHECKS.items():
        if work.stage >= stage:
            check(work)


def _captured(work: Work) -> None:
    graph = work.graph.graph
    outputs = graph.output_node().all_input_nodes
    if len(outputs) != 1 or not is_hidden(outputs[0], work.symbols):
        raise PassError(f"the decoder must return one [batch, tokens, hidden], not {outputs}")
    if not writes(graph.nodes):
        raise PassError("the decoder writes no cache")
    for node in graph.nodes:
        unnamed = node.op == "placeholder" and node.meta.get("val") is None
        if unnamed or node.op in ("get_attr", "call_method"):
            raise PassError(f"{node.format_node()} is not part of a captured graph")


def _normalized(work: Work) -> None:
    names = [node.name for node in work.graph.graph.find_nodes(op="placeholder")]
    if "inputs_embeds" not in names:
        raise PassError("the graph does not start from inputs_embeds")
    for node in work.graph.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            raise PassError(f"{node.name} has no metadata")


def _layered(work: Work) -> None:
    borders = [n for n in work.graph.graph.nodes if meta.get(n).border is not None]
    if len(borders) != work.num_layers + 1:
        raise PassError(f"{len(borders)} layer borders for {work.num_layers} layers")
    for node in borders[1:]:
        if not is_hidden(node, work.symbols):
            raise PassError(f"layer border {node.name} is no [batch, tokens, hidden]")


def _gated(work: Work) -> None:
    gates = work.find(torch.ops.adept_fx.gate.default)
    if [gate.args[3] for gate in gates] != list(range(len(work.exits))):
        raise PassError(f"gates {gates} do not match exits {work.exits}")
    for gate, layer in zip(gates, work.exits, strict=True):
        hidden = gate.args[0]
        if not isinstance(hidden, Node) or meta.get(hidden).border != layer:
            raise PassError(f"the gate of exit {layer} does not see the state after {layer} layers")


def _synthesized(work: Work) -> None:
    for index in range(len(work.exits)):
        if not hasattr(work.graph, f"kv_{index}"):
            raise PassError(f"exit {work.exits[index]} has no KV synthesis")


def _compacted(work: Work) -> None:
    children = {name for name, _ in work.graph.named_children()}
    expected = {f"stage_{i}" for i in range(len(work.exits) + 1)} | {"epilogue"}
    expected |= {f"kv_{i}" for i in range(len(work.exits))}
    if not expected <= children:
        raise PassError(f"the exit-aware graph lacks {sorted(expected - children)}")
    if any(True for _ in work.graph.parameters()) or any(True for _ in work.graph.buffers()):
        raise PassError("the exit-aware graph owns tensors of the model")


_CHECKS: dict[Stage, Callable[[Work], None]] = {
    Stage.CAPTURED: _captured,
    Stage.NORMALIZED: _normalized,
    Stage.LAYERED: _layered,
    Stage.GATED: _gated,
    Stage.SYNTHESIZED: _synthesized,
}
