"""Weights that only their own class can compute with, such as quantized ones.

A tensor subclass that wraps other tensors decides for itself what a product with it does. Traced,
that decision would be frozen into the graph, with the packing of one device and one size of batch.
So a capture sees plain tensors in place of such weights, and at run time the graph hands the real
ones to the same functions of torch that the model's modules call.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from adept_fx.errors import UnsupportedModelError
from adept_fx.graph import meta

_aten = torch.ops.aten


def is_opaque(tensor: object) -> bool:
    """Whether a tensor is a wrapper of others, with operations of its own."""
    return isinstance(tensor, Tensor) and is_traceable_wrapper_subclass(tensor)


@contextmanager
def standing_in(module: nn.Module) -> Iterator[None]:
    """Puts a plain tensor in the place of every opaque parameter, inside the context.

    The plain ones have the shape, dtype and device of the real ones, no values, and no memory to
    speak of. Tied parameters stay tied.
    """
    places = [
        (part._parameters, name, tensor)
        for part in module.modules()
        for name, tensor in part._parameters.items()
        if is_opaque(tensor)
    ]
    plain = {id(tensor): _plain(tensor) for _, _, tensor in places if tensor is not None}
    try:
        for table, name, tensor in places:
            table[name] = plain[id(tensor)]
        yield
    finally:
        for table, name, tensor in places:
            table[name] = tensor


def _plain(tensor: Tensor) -> nn.Parameter:
    like = torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
    return nn.Parameter(like, requires_grad=False)


@dataclass(frozen=True)
class _Call:
    """The function that a wrapper intercepts in place of a captured op.

    ``weight`` is the weight's place among the op's arguments, ``order`` names the op's arguments
    in the function's order. What is left out matters to gradients of the weight alone.
    """

    function: Callable[..., Any]
    weight: int
    order: tuple[int, ...]


_CALLS = {
    _aten.linear.default: _Call(F.linear, weight=1, order=(0, 1, 2)),
    _aten.embedding.default: _Call(F.embedding, weight=0, order=(1, 0)),
}


def call_by_function(graph: fx.Graph, kinds: dict[Node, str]) -> None:
    """Makes a captured graph hand opaque weights to the functions that their class intercepts.

    Args:
        graph: The captured graph.
        kinds: The placeholders of opaque weights, each with the name of its class.

    Raises:
        UnsupportedModelError: The decoder does something else with such a weight.
    """
    for weight, kind in kinds.items():
        meta.update(weight, opaque=kind)
        for user in list(weight.users):
            call = _CALLS.get(user.target)  # type: ignore[call-overload]
            if call is None or user.args[call.weight] is not weight:
                raise UnsupportedModelError(
                    f"the decoder computes {user.target} with {meta.get(weight).source}, "
                    f"a tensor of class {kind}",
                    hint="quantize linear layers and embeddings only",
                )
            user.args = tuple(user.args[at] for at in call.order if at < len(user.args))
            user.target = call.function
