"""KV policies: what stands in front of a skipped layer's own key and value projections."""

from abc import ABC, abstractmethod

from torch.fx import Node

from adept_fx.errors import ConfigError


class KVPolicy(ABC):
    """Decides from which state a skipped layer's keys and values are computed."""

    @abstractmethod
    def map_state(self, hidden: Node, exit_index: int, layer: int) -> Node:
        """The KV map ``m_{e,l}``: builds nodes that turn the exit state into the layer's input.

        Args:
            hidden: The state ``h_e`` that a token left with, ``[B, S, D]``.
            exit_index: Index of the exit point.
            layer: The skipped layer.

        Returns:
            A node of the same shape, in the same graph.
        """


class Synthesize(KVPolicy):
    """The identity map: a skipped layer sees the frozen exit state itself (ADEPT, 2601.03700)."""

    def map_state(self, hidden: Node, exit_index: int, layer: int) -> Node:
        """Returns ``hidden``; equal inputs let the layers share their norm statistic."""
        return hidden


_POLICIES: dict[str, type[KVPolicy]] = {"synthesize": Synthesize}


def build_policy(name: str) -> KVPolicy:
    """The policy of that name.

    Raises:
        ConfigError: No policy has that name.
    """
    if name not in _POLICIES:
        raise ConfigError(f"unknown KV policy {name!r}; known: {', '.join(sorted(_POLICIES))}")
    return _POLICIES[name]()
