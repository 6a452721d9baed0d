"""The pipeline: the one place that knows which passes run, and in which order."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from adept_fx.capture import Capture
from adept_fx.graph.base import Pass, Work
from adept_fx.graph.blocks import Synthesis
from adept_fx.graph.kv_projections import KVProjection, kv_projections
from adept_fx.graph.runner import PassRecord, run_passes
from adept_fx.intercept import MaskCall
from adept_fx.kv.base import KVPolicy
from adept_fx.lower.masks import slices_keys
from adept_fx.passes.compact_tokens import CompactTokens
from adept_fx.passes.find_layers import FindLayers
from adept_fx.passes.fold_attention import FoldAttention
from adept_fx.passes.hoist_prologue import HoistPrologue
from adept_fx.passes.insert_gates import InsertGates
from adept_fx.passes.normalize import Normalize
from adept_fx.passes.synthesize_kv import SynthesizeKV

PIPELINE: tuple[type[Pass], ...] = (
    Normalize,
    FindLayers,
    HoistPrologue,
    FoldAttention,
    InsertGates,
    SynthesizeKV,
    CompactTokens,
)


@dataclass(frozen=True)
class Program:
    """An exit-aware graph, ready to run, with what its caller must supply.

    Attributes:
        graph: The exit-aware graph.
        inputs: Names of its inputs after ``run``.
        masks: The recorded mask call behind each mask input.
        kinds: The kind of each cache layer: layers of one kind have one key length.
        num_layers: Number of layers of the decoder.
        container: The path of what holds them in the decoder, e.g. ``layers``.
        output_type: Class of the decoder's output.
        records: What each pass did.
    """

    graph: fx.GraphModule
    inputs: tuple[str, ...]
    masks: dict[str, MaskCall]
    kinds: dict[int, str]
    num_layers: int
    container: str
    output_type: type
    records: tuple[PassRecord, ...]

    @cached_property
    def slices_keys(self) -> bool:
        """Whether attention may be given a part of the cached keys: see :mod:`adept_fx.lower`."""
        return slices_keys(self.graph, self.masks)

    @cached_property
    def kind_layers(self) -> tuple[int, ...]:
        """One layer of each kind."""
        return tuple({kind: layer for layer, kind in self.kinds.items()}.values())

    @property
    def kv_projections(self) -> tuple[KVProjection, ...]:
        """How keys and values of the layers behind the first exit point are projected."""
        block = self.graph.get_submodule("kv_0")
        return kv_projections(block.graph.graph) if isinstance(block, Synthesis) else ()


def start(
    captured: Capture,
    exits: tuple[int, ...],
    needs: tuple[frozenset[str], ...],
    policy: KVPolicy,
    adapters: bool = False,
) -> Work:
    """A captured graph as work for the passes."""
    return Work(
        graph=captured.graph,
        symbols=captured.symbols,
        sources=captured.sources,
        attentions=captured.attentions,
        masks=captured.masks,
        mixers=captured.mixers,
        exits=exits,
        needs=needs,
        policy=policy,
        adapters=adapters,
    )


def build(captured: Capture, work: Work, passes: Sequence[type[Pass]] = PIPELINE) -> Program:
    """Runs the passes and wraps the result."""
    records = run_passes(work, [step() for step in passes])
    names = [node.name for node in work.graph.graph.find_nodes(op="placeholder")]
    masks = {
        name: captured.masks[int(name.split("_")[1])] for name in names if name.startswith("mask_")
    }
    return Program(
        graph=work.graph,
        inputs=tuple(names[1:]),
        masks=masks,
        kinds=captured.kinds,
        num_layers=work.num_layers,
        container=work.container,
        output_type=captured.output_type,
        records=tuple(records),
    )
