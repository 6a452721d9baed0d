"""Between packed tokens and rows: what attention needs in the compacted layout.

Shapes: ``N`` live tokens, ``R`` rows that have one, ``W`` most live tokens of a row; ``B``, ``S``
of the call. Every slot of ``[R, W]`` beyond a row's last live token repeats that token, so that
no query attends to nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from adept_fx.graph.symbols import TokenAxes


def take(value: Tensor, axes: TokenAxes, index: Tensor, tokens: int | None) -> Tensor:
    """Packs chosen tokens: the token axes become ``1`` and ``len(index)``.

    Args:
        value: Token-aligned value.
        axes: Its token axes.
        index: ``b * S + s`` if ``value`` is in the layout of the call, else positions in it.
        tokens: ``S`` if ``value`` is in the layout of the call, None if it is packed already.
    """
    batch, token, flat, _ = axes
    if flat is not None:
        return value.index_select(flat, index)
    if token is None:
        return value
    if tokens is None:
        return value.index_select(token, index)
    if batch is None:
        return value.index_select(token, index % tokens)
    split = _split_batch(value, axes)
    token = token + (axes.inner > 1 and token > batch)
    packed = split.movedim((batch, token), (0, 1)).flatten(0, 1).index_select(0, index)
    return _merge_batch(packed.unsqueeze(0).movedim((0, 1), (batch, token)), axes)


def share_row(positions: Tensor, others: Tensor, batch: int, tokens: int) -> Tensor:
    """Which positions ``b * S + s`` are in a row with one of ``others``, ``[N]`` bool.

    Args:
        positions: What is asked about, ``[N]``.
        others: Positions, ``[M]``.
        batch: ``B``.
        tokens: ``S``.
    """
    rows = torch.zeros(batch, dtype=torch.bool, device=positions.device)
    rows[torch.div(others, tokens, rounding_mode="floor")] = True
    return rows[torch.div(positions, tokens, rounding_mode="floor")]


def spots(index: Tensor, number: Tensor, tokens: int) -> Tensor:
    """Positions ``b * S + s`` where row ``b`` has another number."""
    row = torch.div(index, tokens, rounding_mode="floor")
    return number[row] * tokens + index % tokens


class Rows:
    """The rows behind a packed layout.

    Args:
        present: The rows, ``[R]``.
        slot: Where each live token is among the ``R * W`` places, ``[N]``.
        padded: The live token at each place, ``[R, W]``.
        column: Its column in the call, ``[R, W]``.
        everything: Whether these are all rows of the call, in order.
    """

    def __init__(
        self, present: Tensor, slot: Tensor, padded: Tensor, column: Tensor, everything: bool
    ) -> None:
        self.present = present
        self.slot = slot
        self.padded = padded
        self.column = column
        self.everything = everything

    @staticmethod
    def of(index: Tensor, batch: int, tokens: int) -> "Rows":
        """The rows that have a live token, as narrow as can be.

        Args:
            index: Positions ``b * S + s`` of the live tokens, ascending, ``[N]``.
            batch: ``B``.
            tokens: ``S``.
        """
        row = torch.div(index, tokens, rounding_mode="floor")
        present, inverse, counts = torch.unique_consecutive(
            row, return_inverse=True, return_counts=True
        )
        start = counts.cumsum(0) - counts
        within = torch.arange(index.numel(), device=index.device) - start[inverse]
        width = int(counts.max())
        step = torch.arange(width, device=index.device)
        padded = start[:, None] + torch.minimum(step[None, :], counts[:, None] - 1)
        column = (index % tokens)[padded]
        return Rows(present, inverse * width + within, padded, column, len(present) == batch)

    @staticmethod
    def all_of(index: Tensor, live: int, batch: int, tokens: int) -> "Rows":
        """All rows of the call; those without a live token repeat that of another row.

        Cached keys need not be copied then. No size of one but ``B`` and ``S`` appears, so that
        a compiled graph fits any number of tokens.

        Args:
            index: Positions of the live tokens, ascending; the last may be repeated.
            live: How many there are without the repetitions.
            batch: ``B``.
            tokens: ``S``.
        """
        row = torch.div(index, tokens, rounding_mode="floor")
        present = torch.arange(batch, device=index.device)
        place = torch.arange(index.numel(), device=index.device)
        if tokens == 1:
            padded = torch.zeros(batch, 1, dtype=torch.long, device=index.device)
            padded[row, 0] = place
            return Rows(present, row, padded, torch.zeros_like(padded), True)
        counts = torch.zeros(batch, dtype=torch.long, device=index.device)
        counts.index_add_(0, row[:live], torch.ones_like(row[:live]))
        start = counts.cumsum(0) - counts
        width = max(int(counts.max()), 2)
        step = torch.arange(width, device=index.device)
        last = (counts - 1).clamp(min=0)
        padded = start[:, None] + torch.minimum(step[None, :], last[:, None])
        padded = padded.clamp(max=live - 1)
        within = torch.minimum(place, place.new_tensor(live - 1)) - start[row]
        return Rows(present, row * width + within, padded, (index % tokens)[padded], True)

    @staticmethod
    def rows_of(index: Tensor, live: int, batch: int, tokens: int) -> tuple["Rows", Tensor]:
        """As :meth:`all_of`, of the rows with a live token alone, two of them at least.

        Where there is no cache, keys of other rows are not there either.

        Returns:
            The rows, and their number for each row of the call, ``[B]``: -1 for those left out.
        """
        own = torch.zeros(batch, dtype=torch.bool, device=index.device)
        own[torch.div(index, tokens, rounding_mode="floor")] = True
        present = own.nonzero().squeeze(1)
        if len(present) < 2:
            present = torch.cat((present, (present + 1) % batch)).sort().values
        number = torch.full((batch,), -1, dtype=torch.long, device=index.device)
        number[present] = torch.arange(len(present), device=index.device)
        spot = spots(index, number, tokens)
        rows = Rows.all_of(spot, live, len(present), tokens)
        return Rows(present, rows.slot, rows.padded, rows.column, True), number

    def each(self, function: Callable[[Tensor], Tensor]) -> "Rows":
        """The same rows, with a function applied to each tensor."""
        return Rows(
            function(self.present),
            function(self.slot),
            function(self.padded),
            function(self.column),
            self.everything,
        )

    @property
    def count(self) -> int:
        """``R``."""
        return self.padded.shape[0]

    @property
    def width(self) -> int:
        """``W``: the most live tokens of a row."""
        return self.padded.shape[1]

    def input(
        self, value: Tensor | None, kind: str, axes: TokenAxes, keys: Tensor, tokens: int
    ) -> Tensor | None:
        """An input of attention (see ``AttentionRegion``), one row for each row here.

        Args:
            value: The input.
            kind: What it is.
            axes: Its token axes.
            keys: The keys, ``[B, H, T, D]``.
            tokens: ``S`` of the call.
        """
        if value is None:
            return self.causal(keys, tokens)
        if kind == "cached":
            return self.select(value)
        if kind == "plain":
            return value
        return self.pad(value, axes) if kind == "live" else self.of_call(value, axes)

    def select(self, cached: Tensor) -> Tensor:
        """Cached keys or values ``[B, H, T, D]`` of the rows that have a live token."""
        return cached if self.everything else cached.index_select(0, self.present)

    def pad(self, value: Tensor, axes: TokenAxes) -> Tensor:
        """From packed ``[1, N]`` to ``[R, W]``."""
        batch, token, flat, _ = axes
        if flat is not None:
            return value.index_select(flat, self.padded.flatten())
        if token is None or batch is None:
            raise ValueError(f"value with token axes {axes} cannot be laid out in rows")
        split = _split_batch(value, axes)
        token = token + (axes.inner > 1)
        wide = split.index_select(token, self.padded.flatten())
        wide = wide.unflatten(token, (self.count, self.width)).movedim(token, batch)
        return _merge_batch(wide.squeeze(batch + 1), axes)

    def pack(self, value: Tensor, axes: TokenAxes) -> Tensor:
        """From ``[R, W]`` to packed ``[1, N]``."""
        return take(value, axes, self.slot, self.width)

    def of_call(self, value: Tensor, axes: TokenAxes) -> Tensor:
        """From the layout of the call ``[B, S]`` to ``[R, W]``: masks, position biases."""
        batch, token, _, _ = axes
        if batch is None:
            # One value for all rows: ``[1, ..., S, ...]``.
            batch, axes = 0, TokenAxes(0, token)
        split = _split_batch(value, axes)
        # One value for all rows may have a batch axis, too: of size 1.
        present = self.present if split.shape[batch] > 1 else torch.zeros_like(self.present)
        if token is None:
            return _merge_batch(split.index_select(batch, present), axes)
        token = token + (axes.inner > 1)
        chosen = split.movedim((batch, token), (0, 1))[present[:, None], self.column]
        return _merge_batch(chosen.movedim((0, 1), (batch, token)), axes)

    def causal(self, keys: Tensor, tokens: int) -> Tensor | None:
        """The mask that transformers left out because ``is_causal`` says the same.

        It does so for one new token (which sees every key) and for a whole prompt (where query
        ``s`` sees keys up to ``s``).
        """
        if tokens == 1:
            return None
        step = torch.arange(keys.shape[2], device=keys.device)
        return (step <= self.column[:, :, None])[:, None]


def _split_batch(value: Tensor, axes: TokenAxes) -> Tensor:
    if axes.inner == 1 or axes.batch is None:
        return value
    split: Tensor = value.unflatten(axes.batch, (-1, axes.inner))
    return split


def _merge_batch(value: Tensor, axes: TokenAxes) -> Tensor:
    if axes.inner == 1 or axes.batch is None:
        return value
    return value.flatten(axes.batch, axes.batch + 1)
