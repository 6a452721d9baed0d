"""Reads off an exit-aware graph what each layer is."""

import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.fx import Node
from transformers import masking_utils

from adept_fx.graph import meta
from adept_fx.graph.blocks import AttentionRegion, Block, MixerRegion, Stage
from adept_fx.intercept import FULL
from adept_fx.ops import tokens as ops
from adept_fx.ops.attention import Attention
from adept_fx.pipeline import Program
from adept_fx.report import facts

RECURRENT = "recurrent"
# Mask functions of transformers that leave out distant tokens: the kind of attention, and the field
# of the config that has the window.
_NARROW: dict[Any, tuple[str, str]] = {
    masking_utils.create_sliding_window_causal_mask: ("sliding_attention", "sliding_window"),
    masking_utils.create_chunked_causal_mask: ("chunked_attention", "attention_chunk_size"),
}


@dataclass
class _Found:
    """What was seen of one layer so far."""

    kinds: dict[str, None] = field(default_factory=dict)
    window: int | None = None
    attention: dict[str, None] = field(default_factory=dict)
    own_attention: bool = False
    mixer: tuple[str, str] | None = None
    key: tuple[int, int] | None = None
    value: tuple[int, int] | None = None
    index_key: int | None = None
    reads_keys_of: set[int] = field(default_factory=set)


class Layers:
    """The layers of a program.

    Args:
        program: The program.

    Attributes:
        writer: The layer that writes each slot of the cache.
        mixers: The modules with recurrent state, by layer.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.writer: dict[str, int] = {}
        self.mixers: dict[int, list[Any]] = defaultdict(list)
        self._found: dict[int, _Found] = defaultdict(_Found)
        for call, stage in stages(program.graph):
            inputs = stage.graph.graph.find_nodes(op="placeholder")
            outer = dict(zip(inputs, call.args, strict=False))  # the model's tensors follow
            for node in stage.graph.graph.nodes:
                self._read(node, stage, outer)

    def layer(self, index: int, parameters: int) -> facts.Layer:
        """The facts of one layer."""
        found = self._found[index]
        values = vars(found) | {
            "kinds": tuple(found.kinds),
            "attention": tuple(found.attention),
            "reads_keys_of": tuple(sorted(found.reads_keys_of)),
        }
        return facts.Layer(index, parameters, **values)

    def _read(self, node: Node, stage: Stage, outer: dict[Node, Any]) -> None:
        layer = meta.get(node).layer
        if layer is None:
            return
        if node.target in (ops.write_cache, ops.write_index):
            self._write(node, self._found[layer], layer)
        elif node.op == "call_module":
            region = stage.graph.get_submodule(str(node.target))
            if isinstance(region, AttentionRegion):
                self._attention(node, region, layer, outer)
            elif isinstance(region, MixerRegion):
                self._mixer(region, layer)

    def _write(self, node: Node, found: _Found, layer: int) -> None:
        if node.target is ops.write_index:
            found.index_key = heads_and_width(node.args[1])[1]
        else:
            found.key, found.value = (heads_and_width(item) for item in node.args[1:3])
        self.writer[str(_slot(node))] = layer

    def _attention(
        self, node: Node, region: AttentionRegion, layer: int, outer: dict[Node, Any]
    ) -> None:
        found = self._found[layer]
        slots = [
            _read_slot(value)
            for value, kind in zip(node.args[1:], region.kinds, strict=True)
            if kind == "cached"
        ]
        if not any(slot.startswith("kv_") for slot in slots):
            return  # it only chooses which keys to attend to
        calls = [part.call[0] for part in region.graph.modules() if isinstance(part, Attention)]
        names = [getattr(call.function, "__name__", type(call.function).__name__) for call in calls]
        found.attention.update(dict.fromkeys(names))
        found.own_attention |= not calls
        found.reads_keys_of |= {self.writer[slot] for slot in slots} - {layer}
        kind, window = self._kind(slots[0], [outer.get(i) for i in node.all_input_nodes])
        found.kinds[kind] = None
        found.window = window if window is not None else found.window

    def _kind(self, slot: str, inputs: list[Any]) -> tuple[str, int | None]:
        """By the mask that a layer reads, or else by the keys that it reads."""
        for item in inputs:
            mask = self.program.masks.get(item.name) if isinstance(item, Node) else None
            if mask is not None:
                kind, name = _NARROW.get(mask.function, (FULL, ""))
                window = getattr(mask.keywords.get("config"), name, None)
                return kind, window if isinstance(window, int) else None
        writer = self._found[self.writer[slot]]
        kind = self.program.kinds.get(int(slot.rpartition("_")[2]), FULL)
        return kind, writer.window if kind in writer.kinds else None

    def _mixer(self, region: MixerRegion, layer: int) -> None:
        call = region.mixer.call[0]
        path = call.name.removeprefix(f"{self.program.container}.").removeprefix(f"{layer}.")
        found = self._found[layer]
        found.kinds[RECURRENT] = None
        found.mixer = (path, type(call.module).__name__)
        self.mixers[layer].append(call.module)
        self.writer[region.slot] = layer


def stages(graph: fx.GraphModule) -> Iterator[tuple[Node, Stage]]:
    """The stages, in order, each with the node that calls it."""
    for node in graph.graph.find_nodes(op="call_module"):
        block = graph.get_submodule(str(node.target))
        if isinstance(block, Stage):
            yield node, block


def outputs(block: Block) -> list[Node]:
    """What a block's graph returns."""
    returned: Any = block.graph.graph.output_node().args[0]
    return list(returned) if isinstance(returned, (tuple, list)) else [returned]


def heads_and_width(node: Any) -> tuple[int, int]:
    """Heads and width of ``[B, H, S, D]``, or 1 and width of ``[B, S, D]``."""
    shape = node.meta["val"].shape
    return (int(shape[1]) if len(shape) == 4 else 1, int(shape[-1]))


def _slot(node: Node) -> Any:
    return node.args[3] if node.target is ops.write_cache else node.args[2]


def _read_slot(value: Any) -> str:
    """The slot behind a region's cached input."""
    if value.target is operator.getitem:
        value = value.args[0]
    return str(value.args[1] if value.target is ops.read_cache else _slot(value))
