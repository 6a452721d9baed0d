"""Only the columns that something needs are computed, and they are the right ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim

from adept_fx.graph import meta
from adept_fx.graph.extract import Extraction
from adept_fx.graph.projections import cut_unused_columns
from adept_fx.graph.symbols import Symbols, expression
from adept_fx.ops.project import project_heads

H, D, WIDTH = 4, 8, 16  # heads, size of one, width of the stream
Pick = Callable[[Tensor], tuple[Tensor, ...]]


class Fused(nn.Module):
    """One projection, and what a model picks from it; `kind` is how the model stores it."""

    def __init__(self, columns: int, pick: Pick, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        shape = (WIDTH, columns) if kind == "addmm" else (columns, WIDTH)
        self.weight = nn.Parameter(torch.randn(shape).to(dtype))
        self.bias = None if kind == "plain" else nn.Parameter(torch.randn(columns).to(dtype))
        self.pick, self.kind = pick, kind

    def forward(self, states: Tensor) -> tuple[Tensor, ...]:
        if self.kind != "addmm":
            return self.pick(F.linear(states, self.weight, self.bias))
        assert self.bias is not None
        flat = torch.addmm(self.bias, states.reshape(-1, WIDTH), self.weight)
        return self.pick(flat.reshape(*states.shape[:2], -1))


def heads(value: Tensor) -> Tensor:
    return value.reshape(*value.shape[:2], -1, D).transpose(1, 2)


def contiguous(fused: Tensor) -> tuple[Tensor, ...]:
    _, key, value = fused.split(H * D, -1)
    return heads(key), heads(value)


def sliced(fused: Tensor) -> tuple[Tensor, ...]:
    """Fewer heads of keys and values than of queries."""
    return heads(fused[..., H * D : (H + 2) * D]), heads(fused[..., (H + 2) * D :])


def interleaved(fused: Tensor) -> tuple[Tensor, ...]:
    _, key, value = fused.reshape(*fused.shape[:2], H, 3 * D).transpose(1, 2).chunk(3, -1)
    return key, value


def interleaved_axis(fused: Tensor) -> tuple[Tensor, ...]:
    parts = fused.reshape(*fused.shape[:2], H, 3, D)
    return parts[..., 1, :].transpose(1, 2), parts[..., 2, :].transpose(1, 2)


def grouped(fused: Tensor) -> tuple[Tensor, ...]:
    """Two groups, each of two queries, a key and a value."""
    parts = fused.reshape(*fused.shape[:2], 2, 4, D)
    return parts[..., -2, :].transpose(1, 2), parts[..., -1, :].transpose(1, 2)


def turned(fused: Tensor) -> tuple[Tensor, ...]:
    """Keys with tokens last."""
    _, key, value = fused.split(H * D, -1)
    return heads(key).transpose(2, 3), heads(value)


def one_of_two(fused: Tensor) -> tuple[Tensor, ...]:
    return (heads(fused[..., : H * D]),)


def merged_heads(fused: Tensor) -> tuple[Tensor, ...]:
    _, key, value = fused.split(H * D, -1)
    return heads(key).reshape(-1, key.shape[1], D), heads(value)


CUT: dict[str, tuple[int, Pick]] = {
    "contiguous": (3 * H * D, contiguous),
    "sliced": ((H + 4) * D, sliced),
    "interleaved": (3 * H * D, interleaved),
    "interleaved_axis": (3 * H * D, interleaved_axis),
    "grouped": (8 * D, grouped),
    "turned": (3 * H * D, turned),
    "one_of_two": (2 * H * D, one_of_two),
}
KEPT: dict[str, tuple[int, Pick]] = {
    "all used": (2 * D, lambda f: (f[..., :D] + 1, f[..., D:] + 1)),
    "used as a whole": (3 * D, lambda f: (f[..., :D], f.sum(-1))),
    "overlapping": (3 * D, lambda f: (f[..., : 2 * D], f[..., D:])),
    "no tiling": (10, lambda f: (f.reshape(*f.shape[:2], 5, 2)[..., ::2, :],)),
    "a second half": (6 * D, lambda f: (f.reshape(*f.shape[:2], 6, D)[..., 2:4, 1:],)),
    "other order": (
        3 * H * D,
        lambda f: (f[..., :32].reshape(*f.shape[:2], H, D).transpose(2, 3),),
    ),
}


def part_of(model: Fused) -> tuple[fx.GraphModule, Symbols, list[Tensor]]:
    """The model as a part of a graph: states in front, the model's tensors behind."""
    states = torch.zeros(3, 5, WIDTH, dtype=model.weight.dtype)
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(model, (states,), dynamic_shapes=(free,))
    graph = program.graph_module.graph
    for node in graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    named = program.graph_signature.inputs_to_parameters
    inputs = graph.find_nodes(op="placeholder")
    states_in = next(node for node in inputs if node.name not in named)
    for node in inputs:
        if node.name in named:
            meta.update(node, source=named[node.name])
    batch, tokens = (expression(size) for size in states_in.meta["val"].shape[:2])
    symbols = Symbols(batch, tokens, batch, batch, frozenset())
    part = Extraction(symbols)
    part.add_input(states_in)
    part.copy(node for node in graph.nodes if node.op != "output")
    module = part.finish(graph.output_node().args[0])
    return module, symbols, [getattr(model, named[node.name]) for node in part.sources]


@torch.no_grad()
def test_heads_merged_with_the_batch() -> None:
    """`[B * H, S, D]`, as models that call `bmm` have it: cut right, or not at all."""
    model = Fused(3 * H * D, merged_heads, "plain", torch.float32)
    module, symbols, tensors = part_of(model)
    cut_unused_columns(module, symbols)
    states = torch.randn(2, 3, WIDTH)
    for left, right in zip(module(states, *tensors), model(states), strict=True):
        torch.testing.assert_close(left, right)


def _columns_computed(module: fx.GraphModule) -> int:
    """Output columns of all projections in the graph."""
    total, linear = 0, torch.ops.aten.linear.default
    for node in module.graph.nodes:
        arguments: Any = node.args
        if node.target is project_heads:
            start, size, stride = arguments[3:]
            assert start + size <= stride
            total += arguments[1].meta["val"].shape[0] // stride * size
        elif node.target is linear:
            assert arguments[1].target is torch.ops.aten.slice.Tensor
            total += arguments[1].args[3] - arguments[1].args[2]
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["plain", "biased", "addmm"])
@pytest.mark.parametrize("layout", CUT)
@torch.no_grad()
def test_the_columns_are_those_of_the_full_projection(
    layout: str, kind: str, dtype: torch.dtype
) -> None:
    model = Fused(*CUT[layout], kind, dtype)
    module, symbols, tensors = part_of(model)
    assert cut_unused_columns(module, symbols) == 1
    for batch, tokens in ((2, 3), (1, 7), (4, 1)):
        states = torch.randn(batch, tokens, WIDTH).to(dtype)
        found, wanted = module(states, *tensors), model(states)
        for left, right in zip(found, wanted, strict=True):
            assert left.shape == right.shape
            assert left.dtype == right.dtype
            scale = float(right.abs().max())
            tolerance = scale * (1e-6 if dtype == torch.float32 else 2**-8)
            torch.testing.assert_close(left, right, rtol=0, atol=tolerance)


@pytest.mark.parametrize("layout", CUT)
def test_unused_columns_are_not_computed(layout: str) -> None:
    columns, pick = CUT[layout]
    module, symbols, _ = part_of(Fused(columns, pick, "biased", torch.float32))
    cut_unused_columns(module, symbols)
    used = sum(item.numel() for item in pick(torch.zeros(1, 1, columns)))
    assert _columns_computed(module) == used < columns


@pytest.mark.parametrize("kind", ["plain", "addmm"])
@pytest.mark.parametrize("layout", KEPT)
@torch.no_grad()
def test_other_projections_stay_as_they_are(layout: str, kind: str) -> None:
    model = Fused(*KEPT[layout], kind, torch.float32)
    module, symbols, tensors = part_of(model)
    before = module.code
    assert cut_unused_columns(module, symbols) == 0
    assert module.code == before
    states = torch.randn(2, 3, WIDTH)
    for left, right in zip(module(states, *tensors), model(states), strict=True):
        assert left.equal(right)


@pytest.mark.parametrize("layout", ["contiguous", "interleaved"])
def test_a_second_cut_finds_nothing(layout: str) -> None:
    module, symbols, _ = part_of(Fused(*CUT[layout], "biased", torch.float32))
    assert cut_unused_columns(module, symbols) == 1
    before = module.code
    assert cut_unused_columns(module, symbols) == 0
    assert module.code == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_project_heads_is_its_equation(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    states, weight = torch.randn(2, 3, WIDTH).to(dtype), torch.randn(24, WIDTH).to(dtype)
    offset = torch.randn(24).to(dtype) if bias else None
    wanted = F.linear(states, weight, offset).unflatten(-1, (-1, 12))[..., 4:7].flatten(-2)
    found = project_heads(states, weight, offset, 4, 3, 12)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(found, wanted, rtol=0, atol=float(wanted.abs().max()) * rounding)
