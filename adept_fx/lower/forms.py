"""Compiled graphs, one for each form of their inputs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx


def compiled(graph: fx.GraphModule, options: dict[str, Any]) -> Callable[..., Any]:
    """``torch.compile``, which takes entries out of the options that it is given."""
    inner = options.get("options")
    return torch.compile(graph, **(options if inner is None else options | {"options": {**inner}}))


# Below so many numbers, on a CPU, an op takes less time than the checks before compiled code
# (prologue and final norm of a Llama at batch 1: 196 and 206 us by ops, 310 and 250 us compiled).
_FEW_NUMBERS = 8192


class Forms:
    """A graph that is compiled apart for sizes of 1.

    ``torch.compile`` takes any size for a symbol but 1 (and 0). Each form has code of its own, so
    that a call never looks through the guards of another.

    Args:
        graph: Takes tensors.
        options: Arguments of ``torch.compile``.
        own: How many of the inputs, at the end, are the model's: they may be large.
    """

    def __init__(self, graph: fx.GraphModule, options: dict[str, Any], own: int = 0) -> None:
        self._graph = graph
        self._options = options
        self._own = own
        self._made: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *inputs: Any) -> Any:
        """Runs the graph."""
        if _few(inputs[: len(inputs) - self._own]):
            return self._graph(*inputs)
        given = [plain(item) for item in inputs]
        form = tuple(form_of(item) for item in given)
        function = self._made.get(form)
        if function is None:
            copied = fx.GraphModule(self._graph, self._graph.graph)
            function = self._made[form] = compiled(copied, self._options)
        return function(*given)


def _few(inputs: Sequence[Any]) -> bool:
    """Whether compiled code would not pay."""
    sizes = [x.numel() for x in inputs if isinstance(x, Tensor) and x.device.type == "cpu"]
    return len(sizes) == len(inputs) and sum(sizes) <= _FEW_NUMBERS


def form_of(item: Any) -> Any:
    """What of an input decides the form: whether its first sizes are 1, or it is None."""
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
