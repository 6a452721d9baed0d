"""Training examples out of what users have, and batches out of examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from adept_fx.errors import InputError
from adept_fx.texts import rows_of, texts_of

_LABELS = ("labels", "label")


class Examples(Dataset[dict[str, Tensor]]):
    """Texts, each with its class if it has one."""

    def __init__(self, texts: Sequence[Tensor], labels: Sequence[int] | None = None) -> None:
        self.texts = list(texts)
        self.labels = None if labels is None else list(labels)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        found = {"input_ids": self.texts[index]}
        if self.labels is not None:
            found["labels"] = torch.tensor(self.labels[index])
        return found


def examples_of(dataset: Iterable[Any], count: int, length: int, *, classes: bool) -> Examples:
    """Reads as many examples as can be needed.

    Args:
        dataset: Token ids, or items with ``input_ids`` (and ``labels`` or ``label``).
        count: Number of examples.
        length: Longest text, in tokens. Texts of a language model are cut into pieces, texts of a
            classifier are cut off.
        classes: Whether the model classifies whole texts.

    Raises:
        InputError: There are no examples, or they are no examples.
    """
    if not classes:
        found = Examples(list(texts_of(dataset, count * length, length)))
    else:
        texts: list[Tensor] = []
        labels: list[int | None] = []
        for number, item in enumerate(dataset):
            if len(texts) == count:
                break
            texts.append(_ids(item, number)[:length])
            labels.append(_label(item, number))
        known = [label for label in labels if label is not None]
        found = Examples(texts, known if len(known) == len(texts) else None)
    if not len(found):
        raise InputError("the dataset is empty", hint="give texts of at least two tokens")
    return found


def _ids(item: Any, number: int) -> Tensor:
    rows = list(rows_of(item, number))
    if len(rows) != 1 or not len(rows[0]):
        raise InputError(f"item {number} of the dataset is not one text with at least one token")
    return rows[0]


def _label(item: Any, number: int) -> int | None:
    for name in _LABELS:
        if not hasattr(item, "keys") or name not in item or item[name] is None:
            continue
        try:
            value = torch.as_tensor(item[name])
        except (TypeError, ValueError, RuntimeError):
            value = torch.empty(0)
        if value.numel() != 1 or value.is_floating_point():
            raise InputError(f"item {number} of the dataset has a label that is no class index")
        return int(value)
    return None


def pad_token(ee: Any) -> int:
    """What texts are padded with: heads that pool a row look for the config's token."""
    token = getattr(ee.config, "pad_token_id", None)
    return token if isinstance(token, int) and token >= 0 else 0


def batch(items: Sequence[dict[str, Tensor]], pad: int) -> dict[str, Tensor]:
    """Pads texts on the right: ``input_ids`` and ``attention_mask [B, S]``, ``labels [B]``."""
    longest = max(len(item["input_ids"]) for item in items)
    ids = torch.full((len(items), longest), pad)
    mask = torch.zeros_like(ids)
    for row, item in enumerate(items):
        text = item["input_ids"]
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    found = {"input_ids": ids, "attention_mask": mask}
    if "labels" in items[0]:
        found["labels"] = torch.stack([item["labels"] for item in items])
    return found
