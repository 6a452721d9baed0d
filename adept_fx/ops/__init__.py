"""Marker ops of captured graphs, and the functions that the lowered graph calls.

Marker ops (``torch.ops.adept_fx.*``) stand for what the graph must not see the inside of: the
cache, the masks, the attention kernel, the gates. They have shapes but no kernel; the ``lower``
pass replaces every one of them before a graph may run.
"""

from adept_fx.ops import (
    attention,
    cache_write,
    embed,
    freeze,
    gate,
    index_write,
    map_state,
    mask,
    mixer,
    project,
    tokens,
)

__all__ = [
    "attention",
    "cache_write",
    "embed",
    "freeze",
    "gate",
    "index_write",
    "map_state",
    "mask",
    "mixer",
    "project",
    "tokens",
]
