"""Where keys and values of skipped layers come from."""

from adept_fx.kv.base import KVPolicy
from adept_fx.kv.mapped import Mapped
from adept_fx.low_rank import KVMaps

__all__ = ["KVPolicy", "Mapped", "build_policy"]


def build_policy(maps: KVMaps | None = None, first: int = 0) -> KVPolicy:
    """The policy of a model with these maps.

    Args:
        maps: The learned maps; None for plain synthesis.
        first: The first exit point, in layers.
    """
    return KVPolicy() if maps is None else Mapped(maps, first)
