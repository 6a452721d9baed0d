"""The residual stream of a decoder, by dataflow."""

from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from adept_fx.graph.base import Work
from adept_fx.graph.symbols import (
    Symbols,
    expression,
    free_symbols,
    is_own_size,
    is_scalar,
    token_axes,
)

BEFORE = -1
"""The level of what depends on the embedding, but on no layer."""


@dataclass
class Flow:
    """Dataflow from the embedding to the output.

    Attributes:
        chain: What every path from ``inputs_embeds`` to the output goes through, side values
            aside (the post-dominators of the embedding).
        place: ``place[n]`` is the index of ``n`` in the chain, or the last index before it plus
            one half.
        level: Of each node that depends on the embedding, the last layer whose parameters it
            depends on.
        side: Values from before the layers that layers behind the first read besides the stream.
    """

    chain: list[Node]
    place: dict[Node, float]
    level: dict[Node, int]
    side: list[Node]

    @staticmethod
    def trace(work: Work, layer_of: dict[Node, int]) -> "Flow":
        """Follows the stream; ``layer_of`` says which layer a use of a parameter belongs to."""
        graph = work.graph.graph
        source = next(n for n in graph.find_nodes(op="placeholder") if n.name == "inputs_embeds")
        sink = graph.output_node()
        order = {node: position for position, node in enumerate(graph.nodes)}
        level = _levels(order, source, layer_of)
        stream = _Stream(work.symbols, source, sink, level)
        reached = _backward(order, stream, sink)
        chain, horizon = [], 0
        for node, users in reached.items():
            if horizon <= order[node] and node is not sink:
                chain.append(node)
            horizon = max([horizon, *(order[user] for user in users)])
        side = [
            node
            for node, at in level.items()
            if at == BEFORE and any(stream.leaves(node, user) for user in node.users)
        ]
        return Flow(chain, _places(chain, order, work), level, side)

    def following(self, node: Node) -> int:
        """Index of the first chain element at or after ``node``."""
        return int(-(-self.place[node] // 1))


def _levels(order: dict[Node, int], source: Node, layer_of: dict[Node, int]) -> dict[Node, int]:
    """Levels of all nodes downstream of the embedding; sizes carry no dataflow."""
    level = {source: BEFORE}
    for node in order:
        found = [level[i] for i in node.all_input_nodes if i in level]
        if found and not is_scalar(node):
            level[node] = max(*found, layer_of.get(node, BEFORE), BEFORE)
    return level


def _backward(order: dict[Node, int], stream: "_Stream", sink: Node) -> dict[Node, list[Node]]:
    """Nodes on the stream's paths to the output, in order, with their users on such paths."""
    users: dict[Node, list[Node]] = {sink: []}
    for node in reversed(order):
        if node in stream.level:
            on = [u for u in node.users if u in users and not stream.leaves(node, u)]
            if on:
                users[node] = on
    return {node: users[node] for node in order if node in users}


class _Stream:
    """Tells the residual stream from values that go from layer to layer beside it.

    Those are values of another width (router scores, chosen positions, per-layer embeddings),
    cached keys that a later layer reads again, and what was computed before the layers and is
    read behind the first.
    """

    def __init__(self, symbols: Symbols, source: Node, sink: Node, level: dict[Node, int]) -> None:
        self.symbols = symbols
        self.level = level
        self.widths = {
            expression(node.meta["val"].shape[-1]) for node in (source, *sink.all_input_nodes)
        }

    def leaves(self, node: Node, user: Node) -> bool:
        """Whether ``user`` reads ``node`` as such a side value."""
        before, after = self.level[node], self.level.get(user, BEFORE)
        if after <= before:
            return False
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return False
        if before == BEFORE and after >= 1:
            return True
        if free_symbols(value) & self.symbols.keys:
            return True
        wide = value.ndim > 1 and expression(value.shape[-1]) in self.widths
        return before != BEFORE and not (wide and token_axes(value, self.symbols).aligned)


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
