"""One buffer for the key and value weights of skipped layers."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from adept_fx.capture import TensorRef
from adept_fx.graph import meta
from adept_fx.graph.blocks import Synthesis
from adept_fx.graph.kv_projections import without_numbers
from adept_fx.ops.project import project_layers, project_stacked


@dataclass
class Stacks:
    """Key and value weights of several layers, laid into one buffer each.

    The parameters become views of the buffer, so that no memory is added and in-place updates are
    seen. :meth:`undo` gives every parameter its own memory again.
    """

    places: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    parameters: list[nn.Parameter] = field(default_factory=list)

    def of(self, refs: list[TensorRef]) -> Tensor | None:
        """One ``[L, O, D]`` tensor over these weights; None if they cannot share a buffer."""
        known = [self.places.get(ref.name) for ref in refs]
        if all(place is None for place in known):
            return self._make(refs)
        found = [place for place in known if place is not None]
        buffer, start = found[0]
        together = len(found) == len(refs) and all(
            place[0] is buffer and place[1] == start + at for at, place in enumerate(found)
        )
        return buffer[start : start + len(refs)] if together else None

    def _make(self, refs: list[TensorRef]) -> Tensor | None:
        weights = [ref.get() for ref in refs]
        if any(type(weight) is not nn.Parameter for weight in weights):
            return None  # quantized weights keep their own layout
        buffer = torch.stack([weight.detach() for weight in weights])
        for at, (ref, weight) in enumerate(zip(refs, weights, strict=True)):
            weight.data = buffer[at]
            self.places[ref.name] = (buffer, at)
            self.parameters.append(weight)  # type: ignore[arg-type]
        return buffer

    def undo(self) -> None:
        """Gives every parameter its own memory."""
        for parameter in self.parameters:
            parameter.data = parameter.data.clone()
        self.places.clear()
        self.parameters.clear()


def stack(block: Synthesis, stacks: Stacks) -> None:
    """Makes a block read weights that lie in one buffer, where they can."""
    graph = block.graph.graph
    inputs = graph.find_nodes(op="placeholder")
    own = inputs[len(inputs) - len(block.sources) :]
    refs = dict(zip(own, block.sources, strict=True))
    for call in graph.find_nodes(op="call_function", target=project_layers):
        weights: Any = call.args[1]
        buffer = stacks.of([refs[weight] for weight in weights])
        if buffer is None:
            continue
        torch._dynamo.mark_static(buffer)  # weights: their sizes are no symbols
        last = graph.find_nodes(op="placeholder")[-1]
        with graph.inserting_after(last):
            whole: Node = graph.placeholder(f"stack_{len(refs)}")
        name = without_numbers(refs[weights[0]].name)
        refs[whole] = TensorRef(name, {"stack": buffer}, "stack")
        whole.meta["val"] = torch.empty_like(buffer, device="meta")
        meta.update(whole, source=name)
        call.target = project_stacked
        call.args = (call.args[0], whole, call.args[2])
        for weight in weights:
            if not weight.users:
                graph.erase_node(weight)
                del refs[weight]
    block.sources = list(refs.values())
    graph.lint()
    block.graph.recompile()
