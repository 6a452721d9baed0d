"""Counts parameters: of layers, and of what a token that left does without."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from adept_fx.graph.blocks import Synthesis
from adept_fx.ops.project import project_heads, project_stacked

_SLICE = torch.ops.aten.slice.Tensor
_TRANSPOSE = torch.ops.aten.t.default


class Weights:
    """The parameters of a decoder, layer by layer.

    Args:
        decoder: The decoder.
        container: Where its layers are.
        count: How many it has.

    Attributes:
        layers: Per layer, the size of each parameter by the parameter's id.
        total: Number of all parameters of the decoder; shared ones count once.
    """

    def __init__(self, decoder: nn.Module, container: str, count: int) -> None:
        self.layers: list[dict[int, int]] = [{} for _ in range(count)]
        self.total = parameters(decoder)
        prefix = f"{container}." if container else ""
        for name, parameter in decoder.named_parameters(remove_duplicate=False):
            head = name.removeprefix(prefix).split(".")[0]
            if name.startswith(prefix) and head.isdigit() and int(head) < count:
                self.layers[int(head)][id(parameter)] = parameter.numel()

    def of(self, layers: Iterable[int]) -> dict[int, int]:
        """Sizes of the parameters of some layers, by id; shared ones are there once."""
        return {key: size for layer in layers for key, size in self.layers[layer].items()}

    def skipped(self, after: int, block: Synthesis, running: Iterable[nn.Module]) -> int:
        """Parameters that a token which leaves after so many layers does without.

        Args:
            after: The exit point.
            block: What synthesizes the skipped layers' keys and values.
            running: Modules of the skipped layers that run for all tokens.
        """
        unused = self.of(range(after, len(self.layers)))
        for key in self.of(range(after)):
            unused.pop(key, None)
        for module in running:
            for parameter in module.parameters():
                unused.pop(id(parameter), None)
        count = sum(unused.values())
        for node, tensor in tensors(block).items():
            if id(tensor) in unused or project_stacked in {user.target for user in node.users}:
                count -= used(node)
        return count


def parameters(*modules: nn.Module) -> int:
    """Number of parameters; shared ones count once."""
    found = {id(p): p.numel() for module in modules for p in module.parameters()}
    return sum(found.values())


def tensors(block: Synthesis) -> dict[Node, Any]:
    """The model's tensors that a block reads, by their inputs in its graph."""
    inputs = block.graph.graph.find_nodes(op="placeholder")
    own = inputs[len(inputs) - len(block.sources) :]
    # Not `get()`: a summary must not fail because the model has changed in the meantime.
    found = [source.table.get(source.key) for source in block.sources]
    return dict(zip(own, found, strict=True))


def used(weight: Node) -> int:
    """How many numbers of a weight a graph reads: some columns, or all."""
    shape = [int(size) for size in weight.meta["val"].shape]
    axis, columns = used_columns(weight)
    return math.prod(shape) if axis is None else math.prod(shape) // shape[axis] * columns


def used_columns(weight: Node) -> tuple[int | None, int]:
    """The axis of a weight that is cut, and how many of its columns are read; None if all are."""
    shape = weight.meta["val"].shape
    read: dict[int, torch.Tensor] = {}
    for user in weight.users:
        found = _part(weight, user)
        if found is None:
            return None, 0
        axis, numbers = found
        marks = read.setdefault(axis, torch.zeros(int(shape[axis]), dtype=torch.bool, device="cpu"))
        marks[numbers] = True
    if len(read) != 1:
        return None, 0
    ((axis, marks),) = read.items()
    return axis, int(marks.sum())


def _part(weight: Node, user: Node) -> tuple[int, torch.Tensor] | None:
    """The axis that a reader cuts, and the columns that it takes; None if it reads them all."""
    shape = [int(size) for size in weight.meta["val"].shape]
    arguments: Any = user.args
    if user.target is _SLICE and len(arguments) == 4:
        axis, start, stop = arguments[1:]
        return axis, torch.arange(start, min(stop, shape[axis]), device="cpu")
    axis = 0
    if user.target is _TRANSPOSE and len(user.users) == 1:
        axis, user = 1, next(iter(user.users))
    if user.target is not project_heads:
        return None
    arguments = user.args
    start, size, stride = arguments[3:]
    groups = torch.arange(shape[axis], device="cpu").unflatten(0, (-1, stride))
    return axis, groups[:, start : start + size].flatten()
