"""The residual stream, and what goes from layer to layer beside it."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Node

from adept_fx.errors import UnsupportedModelError
from adept_fx.graph import meta
from adept_fx.graph.base import Work
from adept_fx.graph.flow import BEFORE, Flow
from adept_fx.graph.meta import PROLOGUE
from adept_fx.graph.runner import run_passes
from adept_fx.passes.find_layers import FindLayers
from toys import LAYERS, NOTE, Noting, NotingLayer, Prepared, Toy, work_of


def width(node: Node) -> int:
    size = node.meta["val"].shape[-1]
    return size if isinstance(size, int) else -1


def layered(kind: type[Toy]) -> Work:
    work = work_of(kind, FindLayers)
    run_passes(work, [FindLayers()])
    return work


def flow_of(work: Work) -> Flow:
    """The flow, with the layers as they were found."""
    layer_of = {
        node: owner
        for node in work.graph.graph.nodes
        if (owner := _owner(node)) is not None and node.op != "placeholder"
    }
    return Flow.trace(work, layer_of)


def _owner(node: Node) -> int | None:
    names = [meta.get(i).source or "" for i in node.all_input_nodes]
    found = [int(name.split(".")[1]) for name in names if name.startswith("layers.")]
    return found[0] if found else None


def reading(work: Work, name: str) -> Node:
    """The op that reads a parameter."""
    node = next(n for n in work.graph.graph.nodes if meta.get(n).source == name)
    return next(iter(node.users))


def test_a_note_between_layers_is_no_part_of_the_stream() -> None:
    work = layered(Noting)
    assert work.num_layers == LAYERS
    flow, note = flow_of(work), reading(work, "layers.0.note.weight")
    assert width(note) == NOTE
    assert note not in flow.chain
    assert flow.level[note] == 0
    assert not flow.side
    assert meta.get(note).layer == 0
    readers = {meta.get(user).layer for user in note.users}
    assert readers == {1, 2}


def test_levels_are_layers_and_the_chain_is_in_order() -> None:
    work = layered(Noting)
    flow = flow_of(work)
    for at in range(LAYERS):
        assert flow.level[reading(work, f"layers.{at}.mlp.down_proj.weight")] == at
    embeds = next(n for n in work.graph.graph.nodes if n.name == "inputs_embeds")
    assert flow.level[embeds] == BEFORE
    assert flow.chain[0] is embeds
    assert [flow.place[node] for node in flow.chain] == list(range(len(flow.chain)))
    inner = reading(work, "layers.1.mlp.up_proj.weight")
    assert flow.place[inner] % 1 == 0.5
    assert flow.following(inner) == flow.place[inner] + 0.5
    borders = [n for n in flow.chain if meta.get(n).border is not None]
    assert [meta.get(n).border for n in borders] == list(range(LAYERS + 1))


def test_what_is_made_before_the_layers_belongs_to_the_prologue() -> None:
    work = layered(Prepared)
    flow = flow_of(work)
    assert flow.side
    for name in ("per_layer.weight", "project.weight"):
        node = reading(work, name)
        assert width(node) == LAYERS * NOTE
        assert meta.get(node).layer == PROLOGUE
        assert node not in flow.chain
    assert any(n.name == "input_ids" for n in work.graph.graph.find_nodes(op="placeholder"))
    assert meta.get(reading(work, "layers.0.gate.weight")).layer == 0


def test_a_wide_value_past_a_layer_is_a_second_stream() -> None:
    class WideLayer(NotingLayer):
        def __init__(self, config, at: int) -> None:  # type: ignore[no-untyped-def]
            super().__init__(config, at)
            self.gate = torch.nn.Linear(config.hidden_size, config.hidden_size)
            self.use = torch.nn.Linear(config.hidden_size, config.hidden_size)
            if at == 0:
                self.note = torch.nn.Linear(config.hidden_size, config.hidden_size)

    class Wide(Noting):
        layer_class = WideLayer

    with pytest.raises(UnsupportedModelError, match="separates layer 0 from layer 1"):
        layered(Wide)


def test_cached_keys_that_are_read_again_are_no_part_of_the_stream() -> None:
    work = work_of(Toy, FindLayers)
    attend = work.find(torch.ops.adept_fx.attention.default)
    attend[2].args = (attend[2].args[0], *attend[0].args[1:3], *attend[2].args[3:])
    run_passes(work, [FindLayers()])
    assert work.num_layers == LAYERS
    assert meta.get(attend[2]).layer == 2
    assert attend[0].args[1] not in flow_of(work).chain
