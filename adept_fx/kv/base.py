"""KV policies: what stands in front of a skipped layer's own key and value projections."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.fx import Node

from adept_fx.capture import TensorRef

Source = Callable[[str], Node]


class KVPolicy:
    """Decides from which state a skipped layer's keys and values are computed.

    The base class is the identity: a skipped layer sees the frozen exit state itself (ADEPT,
    arXiv:2601.03700), and as all layers see the same, they share their norm statistic.
    """

    def tensors(self) -> dict[str, TensorRef]:
        """The maps' own tensors, by the names that :meth:`map_state` asks for."""
        return {}

    def which(self, layer: int) -> int:
        """Which of the policy's maps a skipped layer has; layers may share one."""
        return 0

    def map_state(self, hidden: Node, left: Node, which: int, tensor: Source) -> Node:
        """The KV maps ``m_{e,l}``: builds nodes that turn exit states into a layer's input.

        Args:
            hidden: The states ``h_e`` that tokens left with, ``[B, S, D]``.
            left: At which exit point each of them left, ``[B, S, E]`` bool.
            which: The layer's map.
            tensor: Gives the node, in the same graph, of one of :meth:`tensors`.

        Returns:
            A node of the same shape, in the same graph.
        """
        return hidden


def maps_needed(kind: str, exits: tuple[int, ...], num_layers: int) -> int:
    """How many maps per exit point a policy (a value of ``ExitConfig.kv``) has."""
    return {"map": 1, "map_per_layer": num_layers - exits[0]}.get(kind, 0)


def module_tensors(module: nn.Module, prefix: str) -> dict[str, TensorRef]:
    """References to a module's own parameters."""
    return {
        name: TensorRef(f"{prefix}.{name}", module._parameters, name)  # type: ignore[arg-type]
        for name in module._parameters
    }
