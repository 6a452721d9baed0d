"""The symbols of a captured graph, and which axes of a value are token axes.

A captured graph is symbolic in batch ``B``, new tokens ``S``, cached rows ``R``, past length and
one key length ``T`` per kind of layer. Which axes of a value follow the tokens can therefore be
read off its shape, whatever the model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import sympy
import torch
from torch import SymInt, Tensor
from torch.fx import Node


@dataclass(frozen=True)
class Symbols:
    """Sympy symbols of one capture; ``rows`` is ``batch`` where the model ties them."""

    batch: sympy.Symbol
    tokens: sympy.Symbol
    rows: sympy.Symbol
    past: sympy.Symbol
    keys: frozenset[sympy.Symbol]


class TokenAxes(NamedTuple):
    """Where a value keeps its tokens.

    ``batch`` and ``token`` are axes of size ``B * inner`` and ``S``; ``flat`` is one axis of size
    ``B * S``. ``inner`` is the factor of a batch axis that other axes were folded into (heads).
    """

    batch: int | None = None
    token: int | None = None
    flat: int | None = None
    inner: int = 1

    @property
    def aligned(self) -> bool:
        """Whether the value has one entry per token at all."""
        return self.token is not None or self.flat is not None

    def __bool__(self) -> bool:
        return self.aligned or self.batch is not None


def expression(size: int | SymInt) -> sympy.Expr:
    """The sympy expression of a size."""
    return size.node.expr if isinstance(size, SymInt) else sympy.Integer(size)


def token_axes(value: object, symbols: Symbols) -> TokenAxes:
    """Reads the token axes off the shape of ``value`` (no axes for anything but a tensor)."""
    if not isinstance(value, Tensor):
        return TokenAxes()
    found: dict[str, int] = {}
    for axis, size in enumerate(value.shape):
        expr = expression(size)
        if expr == symbols.tokens:
            found.setdefault("token", axis)
        elif expr == symbols.batch * symbols.tokens:
            found.setdefault("flat", axis)
        elif symbols.batch in expr.free_symbols:
            factor = sympy.simplify(expr / symbols.batch)
            if factor.is_Integer:
                found.setdefault("batch", axis)
                found["inner"] = int(factor)
    return TokenAxes(**found)


def free_symbols(value: object) -> set[sympy.Symbol]:
    """All symbols in the shape of a tensor (or of a tuple of them), or in a symbolic integer."""
    if isinstance(value, SymInt):
        return set(value.node.expr.free_symbols)
    if isinstance(value, Tensor):
        return {s for size in value.shape for s in expression(size).free_symbols}
    if isinstance(value, (tuple, list)):
        return set().union(*(free_symbols(item) for item in value)) if value else set()
    return set()


def is_scalar(node: Node) -> bool:
    """Whether the node yields a size (or other host number), not a tensor."""
    return isinstance(
        node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
    )


def is_own_size(node: Node, symbols: Symbols, more: frozenset[sympy.Symbol] = frozenset()) -> bool:
    """Whether the node is a size made of batch and new tokens alone.

    Such a size means something else in a compacted part of the graph, and is computed there from
    the shapes of its own inputs.
    """
    value = node.meta.get("val")
    own = {symbols.batch, symbols.tokens, symbols.rows, *more}
    return isinstance(value, SymInt) and free_symbols(value) <= own


def is_hidden(node: Node, symbols: Symbols) -> bool:
    """Whether the node is a ``[B, S, D]`` tensor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim != 3:
        return False
    return [expression(size) for size in value.shape[:2]] == [symbols.batch, symbols.tokens]


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    """All nodes that ``nodes`` depend on, themselves included."""
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen
