"""Counts what the layers' weights really multiply, below everything that the product says of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# Left and right operand of each product.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    _aten.mm.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.bmm.default: (0, 1),
    _aten.baddbmm.default: (1, 2),
    _aten.linear.default: (0, 1),
    _aten.matmul.default: (0, 1),
    _aten.mv.default: (0, 1),
    _aten.addmv.default: (1, 2),
    _aten.dot.default: (0, 1),
    _aten._scaled_mm.default: (0, 1),
}
# What may turn a weight into another tensor that stands for it, or for a part of it.
_COPIES = (
    *("clone", "copy", "_to_copy", "contiguous", "_reshape_copy", "index_select", "index", "cat"),
    *("stack", "slice_copy", "view_copy", "t_copy", "transpose_copy", "permute_copy", "mul"),
)


class Products(TorchDispatchMode):
    """While active, counts for each weight the numbers that products with it computed.

    A weight is told by its storage; copies of it, or of a part, count as the weight.

    Attributes:
        outputs: Per parameter name, numbers computed: rows times columns.
        columns: Per parameter name, columns that a product with all of it has.
        attentions: Attention kernels that ran.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.outputs: Counter[str] = Counter()
        self.attentions = 0
        self.columns: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._copies: list[Tensor] = []
        seen = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in [m.weight]}
        transposed = {id(m.weight) for m in model.modules() if type(m).__name__ == "Conv1D"}
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and id(parameter) not in seen:
                self._names[parameter.untyped_storage().data_ptr()] = name
                self.columns[name] = parameter.shape[1 if id(parameter) in transposed else 0]

    def _name(self, item: object) -> str | None:
        if not isinstance(item, Tensor):
            return None
        return self._names.get(item.untyped_storage().data_ptr())

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        title = function.overloadpacket.__name__
        if "scaled_dot_product" in title and "backward" not in title:
            self.attentions += 1
        if function in _PRODUCTS:
            names = {self._name(args[at]) for at in _PRODUCTS[function]} - {None}
            assert len(names) < 2, names
            for name in names:
                self.outputs[str(name)] += result.numel()
        elif title in _COPIES and isinstance(result, Tensor):
            sources = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            names = {self._name(item) for item in sources} - {None}
            if names:
                # Kept alive, so that its address cannot become another tensor's.
                self._copies.append(result)
                self._names.setdefault(result.untyped_storage().data_ptr(), str(names.pop()))
        return result


def counted(model: nn.Module, call: Callable[[], Any]) -> Products:
    """What one call of `model` computes."""
    with torch.no_grad(), Products(model) as products:
        call()
    return products
