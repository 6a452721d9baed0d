"""What tensors without numbers say of a function is what changing its inputs shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adept_fx.runtime.marks import MANY, Marked

BATCH, TOKENS, WIDTH = 3, 5, 8
INDEX = torch.tensor([4, 2, 3])
ROWS = torch.arange(BATCH)
MASK = (torch.arange(TOKENS) > 1)[None, :, None]
LINEAR = nn.Linear(WIDTH, WIDTH)
NORM = nn.LayerNorm(WIDTH)
ATTEND = nn.Linear(WIDTH, 1)

# Each of one token per row.
CHOICES: dict[str, Callable[[Tensor], Tensor]] = {
    "index": lambda x: LINEAR(x)[ROWS, INDEX],
    "last": lambda x: LINEAR(x)[:, -1],
    "slices": lambda x: x[:, 1:][:, 1:2].squeeze(1),
    "gather": lambda x: x.gather(1, INDEX[:, None, None].expand(-1, 1, WIDTH))[:, 0],
    "transposed": lambda x: x.transpose(1, 2)[..., 2],
    "permuted": lambda x: x.permute(1, 0, 2)[3],
    "other rows": lambda x: x[torch.tensor([1, 2, 0]), INDEX],
    "heads": lambda x: x.view(BATCH, TOKENS, 2, 4)[:, 1].flatten(1),
    "flattened": lambda x: LINEAR(x.flatten(0, 1))[ROWS * TOKENS + INDEX],
    "wide rows": lambda x: x.flatten(1)[:, WIDTH : 2 * WIDTH],
    "norm": lambda x: NORM(x + LINEAR(torch.tanh(x)))[:, 0],
    "manual norm": lambda x: (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)))[:, 3],
    "cast": lambda x: (x.double() * 2 - 1).to(torch.float32)[:, 1],
    "softmax of labels": lambda x: LINEAR(x).softmax(-1)[:, 1],
    "dropout off": lambda x: F.dropout(x, 0.5, training=False)[:, 1],
    "best label": lambda x: x.max(-1).values[:, 2:3],
}
# Each of several tokens of its row.
MIXTURES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: LINEAR(x).mean(1),
    "sum": lambda x: (x * torch.ones(BATCH, TOKENS, 1)).sum(dim=1, keepdim=True).squeeze(1),
    "max": lambda x: x.amax(1),
    "difference": lambda x: x[:, 3] - x[:, 1],
    "masked": lambda x: torch.where(MASK, x, 0.0).sum(-2) / MASK.sum(),
    "attention": lambda x: (ATTEND(x).softmax(1) * x).sum(1),
}
REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0, 0, 0].item(),
    "branch": lambda x: x[:, 0] if x.sum() > 0 else x[:, 1],
    "index by value": lambda x: x[ROWS, x[..., 0].argmax(-1)],
    "mask by value": lambda x: x[x > 0],
    "sum up": lambda x: x.cumsum(1)[:, 2],
    "sort": lambda x: x.sort(1).values[:, 0],
    "in place": lambda x: x[:, 0].mul_(2),
    "into another": lambda x: torch.zeros(BATCH, WIDTH).copy_(x[:, 0]),
    "noise": lambda x: F.dropout(x, 0.5, training=True)[:, 1],
    "weights": lambda x: F.linear(torch.ones(2, WIDTH), x[:, 0]),
    "list": lambda x: x.tolist(),
}


def sources(value: Tensor) -> tuple[Tensor, Tensor]:
    assert isinstance(value, Marked)
    return value.by_entry()


def truth(function: Callable[[Tensor], Tensor]) -> Tensor:
    """Whether entry `i` changes with token `(b, s)`: `[entries, B, S]`."""
    states = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    before = function(states)
    changed = torch.zeros(before.shape[0], BATCH, TOKENS, dtype=torch.bool)
    for row in range(BATCH):
        for column in range(TOKENS):
            other = states.clone()
            other[row, column] += 10 * torch.arange(1, WIDTH + 1)
            changed[:, row, column] = (function(other) != before).flatten(1).any(1)
    return changed


@torch.no_grad()
@pytest.mark.parametrize("name", CHOICES)
def test_one_token_is_found(name: str) -> None:
    function = CHOICES[name]
    marked = function(Marked.hidden(torch.zeros(BATCH, TOKENS, WIDTH)))
    real = function(torch.zeros(BATCH, TOKENS, WIDTH))
    assert (marked.shape, marked.dtype) == (real.shape, real.dtype)
    row, column = sources(marked)
    found = torch.zeros(BATCH, BATCH, TOKENS, dtype=torch.bool)
    found[ROWS, row, column] = True
    assert torch.equal(found, truth(function))


@torch.no_grad()
@pytest.mark.parametrize("name", MIXTURES)
def test_several_tokens_are_many(name: str) -> None:
    row, column = sources(MIXTURES[name](Marked.hidden(torch.zeros(BATCH, TOKENS, WIDTH))))
    assert torch.equal(row, ROWS)
    assert (column == MANY).all()
    depends = truth(MIXTURES[name])
    assert (depends.any(-1) == torch.eye(BATCH, dtype=torch.bool)).all()
    assert (depends.sum((1, 2)) > 1).all()


@torch.no_grad()
def test_several_rows_are_many() -> None:
    states = Marked.hidden(torch.zeros(BATCH, TOKENS, WIDTH))
    for mixed in (states[:, 0] - states.mean(), states.sum(0), states[:, 0].flatten()[None]):
        assert (sources(mixed)[0] == MANY).all()
    row, column = sources(states[:, 0] + states[1, 0])
    assert (row.tolist(), column.tolist()) == ([MANY, 1, MANY], [0, 0, 0])


@torch.no_grad()
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_raises(name: str) -> None:
    with pytest.raises((TypeError, RuntimeError, NotImplementedError)):
        REFUSED[name](Marked.hidden(torch.zeros(BATCH, TOKENS, WIDTH)))
