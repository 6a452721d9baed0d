"""``adept_fx::mixer``: marks a call of a module that keeps recurrent state in the cache.

Linear attention, state space models and short convolutions read their state, mix the new tokens
in their order, and write the state back, with kernels and loops of their own. The module is
called as a whole, with the call's own cache: by :class:`Mixer`, on *all* tokens of the call, so
that the state sees the tokens that have left as well, each at its place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

torch.library.define(
    "adept_fx::mixer",
    "(Tensor[] inputs, int width, int donor, int layer, int call, Tensor[] synthesized) -> Tensor",
)


@torch.library.register_fake("adept_fx::mixer")
def _(
    inputs: list[Tensor], width: int, donor: int, layer: int, call: int, synthesized: list[Tensor]
) -> Tensor:
    like = inputs[donor]
    return like.new_empty(*like.shape[:2], width)


class CacheArgument:
    """Stands for the call's cache among recorded arguments."""


@dataclass(frozen=True)
class MixerCall:
    """A recorded call ``module(*args, **kwargs)``.

    Attributes:
        module: The module.
        name: Its path in the decoder.
        leaves: Flattened arguments; None where a tensor goes.
        tensors: Positions of the tensors among the leaves.
        spec: How the leaves make up ``(args, kwargs)``.
        output: Position of the one tensor among the flattened outputs.
    """

    module: nn.Module
    name: str
    leaves: tuple[Any, ...]
    tensors: tuple[int, ...]
    spec: Any
    output: int


class Mixer(nn.Module):
    """Runs a recorded call on all tokens of a forward.

    Args:
        call: What was recorded. The module is referenced, not registered: it stays the model's.
    """

    def __init__(self, call: MixerCall) -> None:
        super().__init__()
        self.call = [call]  # in a list: the model's module must not become a child of this one

    def forward(self, cache: Any, inputs: Sequence[Tensor | None]) -> Tensor:
        """Returns the module's output ``[B, S, D]``; the cache's state is updated."""
        call = self.call[0]
        leaves = [cache if isinstance(leaf, CacheArgument) else leaf for leaf in call.leaves]
        for position, value in zip(call.tensors, inputs, strict=True):
            leaves[position] = value
        args, kwargs = pytree.tree_unflatten(leaves, call.spec)
        output: Tensor = pytree.tree_leaves(call.module(*args, **kwargs))[call.output]
        return output
