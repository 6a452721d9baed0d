"""Describes a rewritten model, from its graph and its modules alone."""

from collections import Counter
from collections.abc import Sequence

from torch import nn

from adept_fx.gates.base import Gate
from adept_fx.gates.registry import GATES
from adept_fx.graph.blocks import Block, Synthesis
from adept_fx.pipeline import Program
from adept_fx.report import facts, synthesis
from adept_fx.report.crossing import crossing
from adept_fx.report.explanation import Explanation
from adept_fx.report.layers import Layers, stages
from adept_fx.report.notes import notes
from adept_fx.report.weights import Weights, parameters


def describe(
    program: Program,
    model: nn.Module,
    decoder: nn.Module,
    exits: Sequence[int],
    gates: Sequence[Gate],
) -> Explanation:
    """Explains a program.

    Args:
        program: The program.
        model: The model, or the decoder if it has no head.
        decoder: The decoder that the program was made of.
        exits: Exit points.
        gates: One per exit point.
    """
    description = _Description(program, decoder, exits)
    layers = description.layers
    return Explanation(
        model=type(model).__name__,
        decoder=type(decoder).__name__,
        num_layers=program.num_layers,
        parameters=description.weights.total,
        container=program.container,
        layers=layers,
        stages=description.stages(),
        exits=tuple(description.exit(index, gate) for index, gate in enumerate(gates)),
        notes=notes(program, layers, exits, gates, _head(model, decoder)),
        compiled=any(b.compiled for b in program.graph.children() if isinstance(b, Block)),
    )


class _Description:
    """What the parts of a description share."""

    def __init__(self, program: Program, decoder: nn.Module, exits: Sequence[int]) -> None:
        self.program = program
        self.exits = exits
        self.weights = Weights(decoder, program.container, program.num_layers)
        self.found = Layers(program)
        sizes = [sum(layer.values()) for layer in self.weights.layers]
        self.layers = tuple(self.found.layer(index, size) for index, size in enumerate(sizes))

    def stages(self) -> tuple[facts.Stage, ...]:
        """What runs between the exit points."""
        return tuple(
            facts.Stage(
                first=stage.layers.start,
                last=stage.layers.stop - 1,
                parameters=sum(self.weights.of(stage.layers).values()),
                kinds=dict(Counter(kind for at in stage.layers for kind in self.layers[at].kinds)),
            )
            for _, stage in stages(self.program.graph)
        )

    def exit(self, index: int, gate: Gate) -> facts.Exit:
        """One exit point."""
        after = self.exits[index]
        block = self.program.graph.get_submodule(f"kv_{index}")
        if not isinstance(block, Synthesis):
            raise TypeError(f"kv_{index} is a {type(block).__name__}")
        running = [m for layer, found in self.found.mixers.items() if layer >= after for m in found]
        skipped = self.weights.skipped(after, block, running)
        return facts.Exit(
            after=after,
            gate=_gate(gate),
            nodes=synthesis.nodes(block),
            slots=synthesis.slots(block, self.found.writer),
            projections=synthesis.projections(block),
            crossing=crossing(self.program.graph, index),
            skipped_parameters=skipped,
            skipped_share=skipped / max(self.weights.total, 1),
        )


def _gate(gate: Gate) -> facts.Gate:
    names = [name for name, kind in GATES.items() if type(gate) is kind]
    name = names[0] if names else type(gate).__name__
    return facts.Gate(name, parameters(gate), tuple(sorted(gate.needs)))


def _head(model: nn.Module, decoder: nn.Module) -> int:
    """Parameters of what follows the decoder; shared with it or not."""
    inside = set(decoder.modules())
    outside = [module for module in model.modules() if module not in inside]
    found = {id(p): p.numel() for module in outside for p in module.parameters(recurse=False)}
    return sum(found.values())
