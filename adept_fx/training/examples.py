"""Training examples out of what users have, and batches out of examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from adept_fx.errors import InputError
from adept_fx.texts import texts_of

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
        labels: list[int] | None = None
    else:
        texts: list[Tensor] = []
        labels = []
        for number, item in enumerate(dataset):
            if len(texts) == count:
                break
            texts.append(_ids(item, number)[:length])
            labels.append(_label(item, number))
        found = Examples(texts, labels if None not in labels else None)
    if not len(found):
        raise InputError("the dataset is empty", hint="give texts of at least two tokens")
    return found


def _ids(item: Any, number: int) -> Tensor:
    (ids,) = texts_of([item], tokens=1 << 60, length=1 << 60)
    return ids


def _label(item: Any, number: int) -> Any:
    for name in _LABELS:
        if hasattr(item, "keys") and name in item:
            value = torch.as_tensor(item[name])
            if value.numel() != 1 or value.is_floating_point():
                raise InputError(f"item {number} of the dataset has a label that is no class index")
            return int(value)
    return None


def batch(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pads texts on the right: ``input_ids`` and ``attention_mask [B, S]``, ``labels [B]``."""
    longest = max(len(item["input_ids"]) for item in items)
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, item in enumerate(items):
        text = item["input_ids"]
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    found = {"input_ids": ids, "attention_mask": mask}
    if "labels" in items[0]:
        found["labels"] = torch.stack([item["labels"] for item in items])
    return found
