"""`compact_tokens`: stages, exits and KV blocks, with gather and scatter between them."""

from __future__ import annotations

import operator
from itertools import pairwise

import pytest
import torch
from torch import fx

from adept_fx.errors import UnsupportedModelError
from adept_fx.graph.base import Work
from adept_fx.graph.blocks import AttentionRegion, Stage, Synthesis
from adept_fx.graph.runner import run_passes
from adept_fx.ops import tokens as ops
from adept_fx.passes.compact_tokens import CompactTokens
from adept_fx.pipeline import PIPELINE

from .check import ROTARY, assert_caught, aten, before, check_pass, each_case, insert, named


@each_case
def test_counts(kind: str, layers: int, exits: tuple[int, ...]) -> None:
    work = before(CompactTokens, kind, layers, exits)
    counts = check_pass(CompactTokens, work)
    tables = 2 if kind in ROTARY else 0  # cos and sin follow the tokens
    own = kind == "opt"  # adds its positions to the embeddings inside the first stage
    gathers = (len(exits) + 1) * (1 + tables) + own
    assert counts == {"stages": len(exits) + 1, "gathers": gathers}


@each_case
def test_every_layer_is_in_one_stage(kind: str, layers: int, exits: tuple[int, ...]) -> None:
    work = before(CompactTokens, kind, layers, exits)
    run_passes(work, [CompactTokens()])
    modules = list(work.graph.modules())
    stages = [module.layers for module in modules if isinstance(module, Stage)]
    bounds = [0, *exits, layers]
    assert stages == [range(*pair) for pair in pairwise(bounds)]
    blocks = [module.layers for module in modules if isinstance(module, Synthesis)]
    assert blocks == [range(e, layers) for e in exits]
    assert sum(isinstance(module, AttentionRegion) for module in modules) == layers
    assert [node.args[1] for node in work.find(ops.decide)] == list(range(len(exits)))
    assert len(work.find(ops.scatter_tokens)) == 1


@each_case
def test_parts_own_no_tensor_and_pass_no_size(
    kind: str, layers: int, exits: tuple[int, ...]
) -> None:
    work = before(CompactTokens, kind, layers, exits)
    flat = {node.name: node for node in work.graph.graph.nodes}
    run_passes(work, [CompactTokens()])
    assert not [*work.graph.parameters(), *work.graph.buffers()]
    for node in work.graph.graph.nodes:
        assert node.target is not aten.sym_size.int
        if node.target is operator.getitem and node.name in flat:
            assert isinstance(flat[node.name].meta["val"], torch.Tensor), f"{node.name} is a size"


def test_the_printed_graph_is_a_page() -> None:
    work = before(CompactTokens, "llama", 5, (1, 2, 3, 4))
    run_passes(work, [CompactTokens()])
    lines = work.graph.code.strip().splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) < 300


def test_a_value_per_row_behind_an_exit_is_refused() -> None:
    work = before(PIPELINE[1], "llama", 3)  # normalized
    positions = named(work, "position_ids")
    last = work.graph.graph.find_nodes(op="placeholder")[-1]
    longest = insert(last, aten.amax.default, positions, [1], True)
    site = next(
        node
        for node in work.graph.graph.find_nodes(op="call_function", target=aten.silu.default)
        if "layers.1" in str(node.meta["nn_module_stack"])
    )
    scale = insert(longest, aten.unsqueeze.default, longest, -1)
    scaled = insert(site, aten.mul.Tensor, site, scale, like=site)
    site.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    with pytest.raises(UnsupportedModelError, match=r"amax|unsqueeze.*one entry per row"):
        run_passes(work, [step() for step in PIPELINE[1:]])


def _marker(work: Work) -> None:
    graph = _stage(work)
    node = next(node for node in graph.nodes if node.name == "hidden")
    with graph.inserting_after(node):
        graph.call_function(torch.ops.adept_fx.freeze.default, (node, node, node))


def _stage(work: Work) -> fx.Graph:
    module = work.graph.get_submodule("stage_1.graph")
    assert isinstance(module, fx.GraphModule)
    return module.graph


def _size_between(work: Work) -> None:
    node = named(work, "stage_0")
    with work.graph.graph.inserting_after(node):
        work.graph.graph.call_function(aten.sym_size.int, (node, 0)).meta["val"] = 1


def _owned(work: Work) -> None:
    work.graph.register_buffer("table", torch.zeros(1))


def _no_epilogue(work: Work) -> None:
    node = named(work, "epilogue")
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    work.graph.graph.erase_node(node)
    del work.graph.epilogue


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_marker, "left the marker .*freeze"),
        (_size_between, "left .*sym_size.* between the stages"),
        (_owned, "owns tensors"),
        (_no_epilogue, r"lacks \['epilogue'\]"),
    ],
)
def test_a_broken_guarantee_is_caught(spoil, match: str) -> None:  # type: ignore[no-untyped-def]
    assert_caught(CompactTokens, before(CompactTokens, "llama", 3), spoil, match)
