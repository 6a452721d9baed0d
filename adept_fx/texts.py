"""Token ids out of what users have: datasets, lists, tensors."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from adept_fx.errors import InputError


def texts_of(dataset: Iterable[Any], tokens: int, length: int) -> Iterator[Tensor]:
    """Pieces of at most ``length`` token ids, until there are ``tokens``.

    Args:
        dataset: Items with ``input_ids``, or token ids themselves: lists or tensors, one text or
            several of one length each.
        tokens: How many tokens are enough.
        length: Longest piece.

    Raises:
        InputError: An item holds no token ids.
    """
    left = tokens
    for number, item in enumerate(dataset):
        for row in _rows(item, number):
            for piece in row.split(length):
                if left < 2:
                    return
                if len(piece) > 1:  # a single token has no next one
                    yield piece[:left]
                    left -= len(piece)


def _rows(item: Any, number: int) -> Iterable[Tensor]:
    ids = item["input_ids"] if hasattr(item, "keys") and "input_ids" in item else item
    try:
        found = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if found.ndim not in (1, 2) or found.is_floating_point() or found.dtype is torch.bool:
        raise InputError(
            f"item {number} of the dataset holds no token ids",
            hint="give items with input_ids, or lists or tensors of token ids",
        )
    return found.long()[None] if found.ndim == 1 else found.long()
