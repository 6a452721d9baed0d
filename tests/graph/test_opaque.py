"""Weights that compute by themselves stay whole in a capture, and are handed over as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from adept_fx.errors import UnsupportedModelError
from adept_fx.graph import meta
from adept_fx.graph.opaque import call_by_function, is_opaque, standing_in

aten = torch.ops.aten


class Doubled(Tensor):
    """Wraps the half of a weight; knows how to multiply by the weight, and nothing else."""

    halved: Tensor

    @staticmethod
    def __new__(cls, half: Tensor) -> Doubled:
        self = Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype)
        self.halved = half
        return self

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["halved"], None

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], *_: Any) -> Doubled:
        return Doubled(tensors["halved"])

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in (F.linear, F.embedding):
            plain = tree_map_only(Doubled, lambda item: 2 * item.halved, args)
            return function(*plain, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:
        raise NotImplementedError(str(function))


def doubled(*shape: int) -> Doubled:
    return Doubled(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))


class Two(nn.Module):
    """Two layers that share a weight, and one of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        shared: Any = doubled(4, 4)
        self.first._parameters["weight"] = self.second._parameters["weight"] = shared


def test_plain_weights_stand_in() -> None:
    model = Two()
    real = model.first.weight
    assert is_opaque(real)
    assert not is_opaque(model.third.weight)
    third = model.third.weight
    with standing_in(model):
        assert type(model.first.weight) is nn.Parameter
        assert model.first.weight is model.second.weight
        assert model.first.weight.shape == (4, 4)
        assert model.first.weight.untyped_storage().nbytes() == 4  # one number
        assert model.third.weight is third
    assert model.first.weight is real
    assert model.second.weight is real


def test_the_real_ones_are_back_after_an_error() -> None:
    model = Two()
    real = model.first.weight
    with pytest.raises(RuntimeError, match="broken"), standing_in(model):
        raise RuntimeError("broken")
    assert model.first.weight is real


def graph_of(call: Any, count: int) -> tuple[fx.Graph, list[fx.Node]]:
    graph = fx.Graph()
    inputs = [graph.placeholder(f"input_{i}") for i in range(count)]
    meta.update(inputs[-1], source="layers.0.weight")
    graph.output(call(graph, inputs))
    return graph, inputs


def test_functions_take_the_place_of_ops() -> None:
    def calls(graph: fx.Graph, inputs: list[fx.Node]) -> Any:
        states, ids, bias, weight = inputs
        return (
            graph.call_function(aten.linear.default, (states, weight)),
            graph.call_function(aten.linear.default, (states, weight, bias)),
            graph.call_function(aten.embedding.default, (weight, ids, 0)),
        )

    graph, inputs = graph_of(calls, 4)
    weight, states, bias = doubled(3, 4), torch.randn(2, 4), torch.randn(3)
    ids = torch.tensor([2, 0])
    run = fx.GraphModule(nn.Module(), graph)
    with pytest.raises(NotImplementedError, match=r"aten\."):
        run(states, ids, bias, weight)
    call_by_function(graph, {inputs[-1]: "Doubled"})
    graph.lint()
    run.recompile()
    found = run(states, ids, bias, weight)
    plain = 2 * weight.halved
    wanted = (F.linear(states, plain), F.linear(states, plain, bias), plain[ids])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert meta.get(inputs[-1]).opaque == "Doubled"


@pytest.mark.parametrize(
    "call",
    [
        lambda graph, i: graph.call_function(aten.mm.default, (i[0], i[1])),
        lambda graph, i: graph.call_function(aten.linear.default, (i[1], i[0])),
        lambda graph, i: graph.call_function(aten.t.default, (i[1],)),
    ],
)
def test_other_uses_are_refused(call: Any) -> None:
    graph, inputs = graph_of(call, 2)
    with pytest.raises(UnsupportedModelError, match=r"with layers\.0\.weight, .* Doubled"):
        call_by_function(graph, {inputs[-1]: "Doubled"})
