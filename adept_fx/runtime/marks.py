"""Tensors that know which tokens they depend on, and hold no numbers.

A head that runs on them tells, at the cost of a few index operations, which tokens its result is
made of. The rules follow what an operation *may* read, never which values it meets: a maximum over
tokens depends on all of them. An operation without a rule, or a look at a value, raises.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten
MANY = -1  # more than one row, or more than one column of a row

# Read each element from one element of their first argument, wherever that is.
_MOVES: dict[Any, Callable[..., Any]] = {
    op: op
    for op in (
        *(_aten.select.int, _aten.slice.Tensor, _aten.index.Tensor, _aten.index_select.default),
        *(_aten.gather.default, _aten.unsqueeze.default, _aten.expand.default, _aten.t.default),
        *(_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.permute.default),
        *(_aten.transpose.int, _aten.alias.default, _aten.detach.default),
    )
} | dict.fromkeys((_aten.view.default, _aten._unsafe_view.default), torch.reshape)
# Mix the last axis of the argument at that place.
_PRODUCTS = {_aten.mm.default: 0, _aten.addmm.default: 1, _aten.bmm.default: 0}
_PRODUCTS |= {_aten.linear.default: 0}
_CAST = _aten._to_copy.default


class Marked(Tensor):
    """A tensor of which only the tokens behind each element are known.

    Attributes:
        marks: Row and column of the one token that an element depends on, each of a shape that
            broadcasts to the tensor's; ``MANY`` where several do.
    """

    marks: tuple[Tensor, Tensor]

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device, marks: tuple[Tensor, Tensor]) -> "Marked":
        """Makes one of the shape and dtype of ``like``."""
        self = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=device)
        self.marks = marks
        for mark in marks:
            mark.expand(like.shape)  # raises if it is none of this tensor's
        return self

    @staticmethod
    def hidden(embeds: Tensor) -> "Marked":
        """Hidden states ``[B, S, D]`` of which each depends on its own token."""
        batch, tokens = embeds.shape[:2]
        row = torch.arange(batch, device=embeds.device)[:, None, None]
        column = torch.arange(tokens, device=embeds.device)[None, :, None]
        like = torch.empty(embeds.shape, dtype=embeds.dtype, device="meta")
        return Marked(like, embeds.device, (row, column))

    def by_entry(self) -> tuple[Tensor, Tensor]:
        """Row and column for each entry of the first axis, each ``[len(self)]``."""
        axes = range(1, self.ndim)
        row, column = (_join(mark.expand(self.shape), axes).flatten() for mark in self.marks)
        return row.expand(len(self)), column.expand(len(self))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function._schema.is_mutable:
            return NotImplemented
        marks = _marks(function, args, kwargs)
        if marks is None:
            return NotImplemented
        device = next(_marked((*args, *kwargs.values()))).device
        meta = tree_map_only(Tensor, _without_numbers, (args, kwargs | _on_meta(kwargs)))
        return tree_map_only(
            Tensor, lambda like: Marked(like, device, marks), function(*meta[0], **meta[1])
        )


def _without_numbers(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _on_meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"device": torch.device("meta")} if kwargs.get("device") is not None else {}


def _marked(values: Sequence[Any]) -> Iterator[Marked]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _marked(value)
        elif isinstance(value, Marked):
            yield value


def _marks(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """The marks of a result; None if there is no rule for it."""
    found = list(_marked((*args, *kwargs.values())))
    reduces = torch.Tag.reduction in function.tags
    if (torch.Tag.pointwise in function.tags and not reduces) or function is _CAST:
        row, column = (_meet([item.marks[at] for item in found]) for at in (0, 1))
        return row, column
    if len(found) != 1:
        return None
    value = found[0]
    row, column = (mark.expand(value.shape) for mark in value.marks)
    if function in _MOVES and args[0] is value:
        move = _MOVES[function]
        return _narrow(move(row, *args[1:], **kwargs)), _narrow(move(column, *args[1:], **kwargs))
    if function in _PRODUCTS and args[_PRODUCTS[function]] is value:
        return _join(row, [-1]), _join(column, [-1])
    if function is _aten._softmax.default:
        return _join(row, [args[1]]), _join(column, [args[1]])
    if function is _aten.native_layer_norm.default and args[0] is value:
        axes = range(value.ndim - len(args[1]), value.ndim)
        return _join(row, axes), _join(column, axes)
    if reduces and args[0] is value:
        return _reduce(function, (row, column), args, kwargs)
    return None


def _reduce(
    function: Any, marks: tuple[Tensor, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    names = [argument.name for argument in function._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    axes = given.get("dim")
    count = marks[0].ndim
    chosen = [axes] if isinstance(axes, int) else list(axes or range(count))
    row, column = (_join(mark, chosen) for mark in marks)
    if given.get("keepdim"):
        return row, column
    gone = tuple(axis % count for axis in chosen)
    return row.squeeze(gone), column.squeeze(gone)


def _narrow(marks: Tensor) -> Tensor:
    """Keeps one entry of each axis along which all are the same memory."""
    for axis, stride in enumerate(marks.stride()):
        if stride == 0:
            marks = marks.narrow(axis, 0, min(1, marks.shape[axis]))
    return marks


def _join(marks: Tensor, axes: Sequence[int]) -> Tensor:
    """One mark for all entries along some axes, which stay with length 1."""
    marks = _narrow(marks)
    for axis in axes:
        if marks.shape[axis] != 1:
            least, most = marks.amin(axis, keepdim=True), marks.amax(axis, keepdim=True)
            marks = torch.where(least == most, least, MANY)
    return marks


def _meet(marks: Sequence[Tensor]) -> Tensor:
    """One mark for each element of several tensors, broadcast against each other."""
    result = marks[0]
    for mark in marks[1:]:
        result = torch.where(result == mark, result, MANY)
    return result
