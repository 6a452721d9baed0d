"""Cuts a part of a graph out into a graph of its own."""

import operator
from collections.abc import Callable, Container, Iterable
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx import Node
from torch.fx.node import map_arg

from adept_fx.errors import PassError
from adept_fx.graph import meta
from adept_fx.graph.symbols import Symbols, expression, is_own_size

Lowering = Callable[["Extraction", Node], Node | None]


class Extraction:
    """Builds a subgraph: inputs first, then copies of what its outputs need.

    Sizes are never passed in. Each is computed again from the shapes of the subgraph's own
    inputs, so that a compacted part computes with compacted sizes (``B * S`` of an expert layer
    is the number of tokens *there*).

    Args:
        symbols: Symbols of the outer graph.
        merge: Compute equal expressions once (common subexpression elimination).
        keys: Key lengths are sizes of this part's own inputs, too.
    """

    def __init__(self, symbols: Symbols, *, merge: bool = False, keys: bool = False) -> None:
        self.symbols = symbols
        self._keys = symbols.keys if keys else frozenset()
        self.graph = fx.Graph()
        self.copies: dict[Node, Node] = {}
        self.inputs: list[Node] = []
        self.sources: list[Node] = []
        self._placeholders: dict[str, list[Node]] = {"input": [], "source": []}
        self._merge = merge
        self._numbers: dict[Any, Node] = {}
        self._sizes: dict[sympy.Expr, Any] = {}

    def add_input(self, outer: Node, name: str | None = None) -> Node:
        """Adds a placeholder that stands for ``outer``; sizes are read off the first inputs."""
        inner = self.copies[outer] = self.placeholder(name or outer.name, outer)
        self.inputs.append(outer)
        return inner

    def placeholder(self, name: str, like: Node | None = None, kind: str = "input") -> Node:
        """Adds a placeholder that stands for no particular outer node."""
        inner = self.graph.placeholder(name)
        if like is not None:
            inner.meta = {"val": like.meta.get("val")}
        self._placeholders[kind].append(inner)
        return inner

    def copy(self, order: Iterable[Node], lower: "Lowering | None" = None) -> None:
        """Copies nodes, given in topological order; tensors of the model become inputs.

        ``lower`` may put something else in a node's place.
        """
        for node in order:
            if node in self.copies or self.is_own_size(node):
                continue
            if meta.get(node).source is not None:
                self.sources.append(node)
                self.copies[node] = self.placeholder(node.name, node, "source")
                self.copies[node].meta.update(node.meta)
                continue
            lowered = lower(self, node) if lower else None
            if lowered is not None:
                lowered.meta = dict(node.meta)
            self.copies[node] = lowered if lowered is not None else self._clone(node)

    def is_own_size(self, node: Node) -> bool:
        """Whether the node is a size that is to be computed from the subgraph's inputs."""
        return is_own_size(node, self.symbols, self._keys)

    def _clone(self, node: Node) -> Node:
        arguments = map_arg(node.args, self.lookup)
        keywords = map_arg(node.kwargs, self.lookup)
        inner = self.graph.create_node(node.op, node.target, arguments, keywords, name=node.name)
        return self.number(inner, node)

    def number(self, inner: Node, like: Node) -> Node:
        """Gives a new node the facts of ``like``, or an equal node's place when merging."""
        inner.meta = dict(like.meta)
        if self._merge and is_pure(inner):
            first = self._numbers.setdefault(value_key(inner), inner)
            if first is not inner:
                self.graph.erase_node(inner)
            return first
        return inner

    def lookup(self, node: Node) -> Any:
        """The copy of an outer node, or a size computed here."""
        if node in self.copies:
            return self.copies[node]
        if self.is_own_size(node):
            return self.size(node.meta["val"].node.expr)
        raise PassError(f"{node.name} is needed by a part of the graph that it is no input of")

    def size(self, expr: sympy.Expr) -> Any:
        """A node (or number) for a size, computed from shapes of the subgraph's inputs."""
        if expr.is_Integer:
            return int(expr)
        if expr not in self._sizes:
            self._sizes[expr] = self._symbol(expr) if expr.is_Symbol else self._arithmetic(expr)
        return self._sizes[expr]

    def _symbol(self, symbol: sympy.Symbol) -> Any:
        for outer in self.inputs:
            value = outer.meta.get("val")
            for axis, length in enumerate(value.shape if isinstance(value, Tensor) else ()):
                ratio = sympy.simplify(expression(length) / symbol)
                if ratio.is_Integer:
                    target = torch.ops.aten.sym_size.int
                    size = self.graph.call_function(target, (self.copies[outer], axis))
                    return (
                        self._keep(size, length)
                        if ratio == 1
                        else self._keep(
                            self.graph.call_function(operator.floordiv, (size, int(ratio))), None
                        )
                    )
        raise PassError(f"no input of this part of the graph has an axis of size {symbol}")

    def _arithmetic(self, expr: sympy.Expr) -> Any:
        parts = [self.size(part) for part in expr.args]
        known: dict[str, Callable[..., Any]] = {
            "Mul": operator.mul,
            "Add": operator.add,
            "FloorDiv": operator.floordiv,
            "CleanDiv": operator.floordiv,
            "Mod": operator.mod,
            "PythonMod": operator.mod,
            "Pow": operator.pow,
            "Max": max,
            "Min": min,
        }
        operation = known.get(type(expr).__name__)
        if operation is None:
            raise PassError(f"cannot compute the size {expr} in a part of the graph")
        result = parts[0]
        for part in parts[1:]:
            result = self.graph.call_function(operation, (result, part))
        return result

    @staticmethod
    def _keep(node: Node, value: Any) -> Node:
        if value is not None:
            node.meta["val"] = value
        return node

    def finish(self, outputs: Any, root: torch.nn.Module | None = None) -> fx.GraphModule:
        """Closes the graph with ``outputs`` (outer nodes, in any nesting) and wraps it.

        ``root`` holds the modules that the graph calls.
        """
        self.graph.output(map_arg(outputs, self.lookup))
        for inner in reversed([*self._placeholders["input"], *self._placeholders["source"]]):
            next(iter(self.graph.nodes)).prepend(inner)
        self.graph.lint()
        return fx.GraphModule(root or torch.nn.Module(), self.graph)


def needed(
    outputs: Iterable[Node],
    stop: Container[Node],
    order: dict[Node, int],
    symbols: Symbols,
    edges: Callable[[Node], list[Node]] = lambda node: node.all_input_nodes,
) -> list[Node]:
    """Everything that ``outputs`` depend on short of ``stop``, in topological order.

    Sizes that a part computes for itself are left out, and what only they depend on.
    """
    seen: set[Node] = set()
    stack = [node for node in outputs if node not in stop]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(i for i in edges(node) if i not in stop and not is_own_size(i, symbols))
    return sorted(seen, key=order.__getitem__)


def is_pure(node: Node) -> bool:
    """Whether two equal calls give equal results: no randomness, no side effect."""
    tags = getattr(node.target, "tags", ())
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded not in tags


def value_key(node: Node) -> Any:
    """Equal for nodes that compute the same from the same inputs."""
    return (node.op, node.target, _frozen(node.args), _frozen(node.kwargs))


def _frozen(item: Any) -> Any:
    if isinstance(item, (list, tuple)):
        return tuple(_frozen(part) for part in item)
    if isinstance(item, dict):
        return tuple(sorted((key, _frozen(part)) for key, part in item.items()))
    # 1, 1.0 and True are equal to Python but not to an op.
    return item if isinstance(item, Node) else (type(item).__name__, repr(item))
