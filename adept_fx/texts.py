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
        for row in rows_of(item, number):
            for piece in row.split(length):
                if left < 2:
                    return
                if len(piece) > 1:  # a single token has no next one
                    yield piece[:left]
                    left -= len(piece)


def rows_of(item: Any, number: int) -> Iterable[Tensor]:
    """The token ids of an item, a text each, without what its ``attention_mask`` leaves out.

    Args:
        item: With ``input_ids``, or token ids themselves.
        number: Of the item, for the message.

    Raises:
        InputError: It holds no token ids.
    """
    keyed = hasattr(item, "keys") and "input_ids" in item
    mask = item["attention_mask"] if keyed and "attention_mask" in item else None
    try:
        ids = torch.as_tensor(item["input_ids"] if keyed else item)
        real = None if mask is None else torch.as_tensor(mask).bool().view(ids.shape)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(1)
    # Lists without any element are floating: empty lines of a text are texts without tokens.
    wrong = ids.numel() > 0 and (ids.is_floating_point() or ids.dtype is torch.bool)
    if ids.ndim not in (1, 2) or wrong:
        raise InputError(
            f"item {number} of the dataset holds no token ids",
            hint="give items with input_ids, or lists or tensors of token ids",
        )
    rows = ids.long()[None] if ids.ndim == 1 else ids.long()
    if real is None:
        return rows
    return [row[keep] for row, keep in zip(rows, real.view(rows.shape), strict=True)]
