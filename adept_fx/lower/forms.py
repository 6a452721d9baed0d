"""Compiled graphs, one for each form of their inputs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx


def compiled(graph: fx.GraphModule, options: dict[str, Any]) -> Callable[..., Any]:
    """``torch.compile``, which takes entries out of the options that it is given."""
    inner = options.get("options")
    return torch.compile(graph, **(options if inner is None else options | {"options": {**inner}}))


class Forms:
    """A graph that is compiled apart for sizes of 1.

    ``torch.compile`` takes any size for a symbol but 1 (and 0). Each form has code of its own, so
    that a call never looks through the guards of another.

    Args:
        graph: Takes tensors.
        options: Arguments of ``torch.compile``.
    """

    def __init__(self, graph: fx.GraphModule, options: dict[str, Any]) -> None:
        self._graph = graph
        self._options = options
        self._made: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *inputs: Any) -> Any:
        """Runs the graph."""
        given = [plain(item) for item in inputs]
        form = tuple(_form(item) for item in given)
        function = self._made.get(form)
        if function is None:
            copied = fx.GraphModule(self._graph, self._graph.graph)
            function = self._made[form] = compiled(copied, self._options)
        return function(*given)


def _form(item: Any) -> Any:
    if not isinstance(item, Tensor):
        return item is None
    return item.shape[:1] == (1,), item.shape[1:2] == (1,)


def plain(item: Any) -> Any:
    """A tensor that is no view, and whose strides follow from its sizes.

    Compiled graphs depend on the sizes of what a view is a view of, and on strides.
    """
    if not isinstance(item, Tensor) or isinstance(item, torch.nn.Parameter):
        return item
    if item.layout is torch.strided and item.stride() != _strides(item.shape):
        # What is contiguous may still have any stride where a size is 1.
        item = item.contiguous().reshape(-1).view(item.shape)
    return item.data if item._is_view() and not torch.is_grad_enabled() else item


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    found, size = [], 1
    for length in reversed(shape):
        found.append(size)
        size *= max(length, 1)
    return tuple(reversed(found))
