"""Learned KV maps."""

from __future__ import annotations

from torch.fx import Node

from adept_fx.capture import TensorRef
from adept_fx.kv.base import KVPolicy, Source, module_tensors
from adept_fx.low_rank import KVMaps
from adept_fx.ops.map_state import mapped


class Mapped(KVPolicy):
    """A low-rank residual map of the exit state: one per exit, or one per exit and layer.

    Args:
        maps: The maps' parameters.
        first: The first exit point, in layers.
    """

    def __init__(self, maps: KVMaps, first: int) -> None:
        self.maps = maps
        self.first = first

    def tensors(self) -> dict[str, TensorRef]:
        """``down`` and ``up`` of all maps."""
        return module_tensors(self.maps, "adept.kv_maps")

    def which(self, layer: int) -> int:
        """The layer counted from the first exit point, if every layer has a map."""
        return layer - self.first if self.maps.down.shape[1] > 1 else 0

    def map_state(self, hidden: Node, left: Node, which: int, tensor: Source) -> Node:
        """One call for all exit points: a state passes the map of the exit that it left at."""
        arguments = (hidden, left, tensor("down"), tensor("up"), which)
        node = hidden.graph.call_function(mapped, arguments)
        node.meta["val"] = hidden.meta["val"]
        return node
