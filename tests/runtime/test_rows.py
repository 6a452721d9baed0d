"""Packing tokens, laying them out in rows, and back."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adept_fx.graph.symbols import TokenAxes
from adept_fx.runtime.rows import Rows, take

HIDDEN = TokenAxes(batch=0, token=1)
HEADS = TokenAxes(batch=0, token=2)
MERGED = TokenAxes(batch=0, token=1, inner=4)  # [B * 4, S, D]
masks = st.integers(1, 4).flatmap(
    lambda b: st.integers(1, 6).flatmap(
        lambda s: st.lists(st.booleans(), min_size=b * s, max_size=b * s).map(lambda m: (b, s, m))
    )
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(masks)
def test_rows_hold_each_live_token_once_and_packing_undoes_it(case: tuple[int, int, list]) -> None:
    batch, tokens, live = case
    index = torch.tensor(live).nonzero().squeeze(1)
    if not index.numel():
        return
    rows = Rows.of(index, batch, tokens)
    assert rows.width == max(sum(live[r * tokens : (r + 1) * tokens]) for r in range(batch))
    hidden = torch.randn(batch, tokens, 3)
    packed = take(hidden, HIDDEN, index, tokens)
    assert torch.equal(packed[0], hidden.flatten(0, 1)[index])
    padded = rows.pad(packed, HIDDEN)
    assert padded.shape == (rows.count, rows.width, 3)
    assert torch.equal(rows.pack(padded, HIDDEN), packed)
    assert torch.equal(rows.of_call(hidden, HIDDEN), padded)
    heads = torch.randn(batch, 4, tokens, 3)
    packed = take(heads, HEADS, index, tokens)
    assert torch.equal(rows.pack(rows.pad(packed, HEADS), HEADS), packed)
    merged = heads.flatten(0, 1)
    packed = take(merged, MERGED, index, tokens)
    assert torch.equal(packed, take(heads, HEADS, index, tokens)[0])
    assert torch.equal(rows.pack(rows.pad(packed, MERGED), MERGED), packed)
    assert torch.equal(rows.of_call(merged, MERGED), rows.of_call(heads, HEADS).flatten(0, 1))


def test_flat_and_unbatched_axes() -> None:
    index = torch.tensor([1, 4, 5])
    flat = torch.arange(6.0)[:, None]
    assert torch.equal(take(flat, TokenAxes(flat=0), index, 3)[:, 0], torch.tensor([1.0, 4, 5]))
    cos = torch.arange(3.0)[None, :, None]
    assert torch.equal(
        take(cos, TokenAxes(token=1), index, 3)[0, :, 0], torch.tensor([1.0, 1.0, 2.0])
    )


def test_the_mask_that_was_left_out() -> None:
    rows = Rows.of(torch.tensor([0, 2, 4]), batch=2, tokens=3)
    mask = rows.causal(torch.zeros(2, 1, 3, 2), tokens=3)
    assert mask is not None
    expected = [[[1, 0, 0], [1, 1, 1]], [[1, 1, 0], [1, 1, 0]]]
    assert torch.equal(mask[:, 0], torch.tensor(expected, dtype=torch.bool))
    assert rows.causal(torch.zeros(2, 1, 9, 2), tokens=1) is None
