"""What the exit-aware graph calls on the layout of its live tokens.

Functions, so that the printed graph reads as the pipeline. ``tokens`` says which tokens are in
the graph's values at this point, and how they lie; see ``adept_fx.runtime.tokens``.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

Axes = tuple[int | None, int | None, int | None, int]


def enter(run: Any, inputs_embeds: Tensor) -> Any:
    """Starts a forward: all tokens of ``inputs_embeds [B, S, D]`` are there."""
    return run.enter(inputs_embeds)


def decide(tokens: Any, exit_index: int, hidden: Tensor, *features: Tensor) -> Any:
    """Runs the gate of an exit point and chooses the plan of the next stage.

    Returns the tokens that go on, in the layout of the next stage.
    """
    return tokens.run.decide(tokens, exit_index, hidden, features)


def gather_tokens(tokens: Any, value: Tensor, axes: Axes) -> Tensor:
    """Brings a token-aligned value into the layout that an exit point chose."""
    result: Tensor = tokens.gather(value, axes)
    return result


def scatter_tokens(layouts: Sequence[Any], hidden: Sequence[Tensor]) -> Tensor:
    """The last state of every token, ``[B, S, D]``: where it left, or after the last layer."""
    result: Tensor = layouts[0].spread(hidden[0])
    for tokens, state in zip(layouts[1:], hidden[1:], strict=True):
        result = tokens.scatter(result, state)
    return result


def freeze_tokens(tokens: Any, new: Tensor, frozen: Tensor) -> Tensor:
    """Keeps the states of tokens that have left; nothing to do where only live ones are in."""
    result: Tensor = tokens.freeze(new, frozen)
    return result


def map_tokens(
    tokens: Any, hidden: Tensor, down: Tensor, up: Tensor, which: int, exits: tuple[int, ...]
) -> Tensor:
    """States as a layer is to see them: behind their KV map, for tokens that have left."""
    result: Tensor = tokens.map_state(hidden, down, up, which, exits)
    return result


def left_at(tokens: Any, exits: tuple[int, ...]) -> Tensor | None:
    """At which exit point each token left, ``[B, S, E]``, in the layout before ``tokens``."""
    result: Tensor | None = tokens.left_at(exits)
    return result


def adapt_exits(tokens: Any, hidden: Tensor) -> Tensor:
    """Puts the last states of tokens that left early, ``[B, S, D]``, through the exit adapters."""
    result: Tensor = tokens.run.adapt(hidden)
    return result


def write_cache(
    tokens: Any,
    key: Tensor,
    value: Tensor,
    slot: str,
    synthesized: Sequence[Any],
    shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """Writes live and synthesized keys and values of one layer; returns what it attends to.

    With ``shared``, a later stage reads the same keys again (:func:`read_cache`).
    """
    result: tuple[Tensor, Tensor] = tokens.write(slot, (key, value), synthesized, shared)
    return result


def write_index(
    tokens: Any, key: Tensor, slot: str, synthesized: Sequence[Any], shared: bool = False
) -> Tensor:
    """Writes live and synthesized index keys of one layer; returns all that it has."""
    result: tuple[Tensor] = tokens.write(slot, (key,), synthesized, shared)
    return result[0]


def read_cache(tokens: Any, slot: str, at: int) -> Tensor:
    """What an earlier stage of this forward got back when it wrote that slot."""
    result: Tensor = tokens.kept[slot][at]
    return result
