"""Step 1 of the pipeline: a Hugging Face decoder becomes one flat FX graph.

``torch.export`` (non-strict) with symbolic batch, new tokens, cached rows, past length and one
key length per kind of layer. Cache writes, masks, attention and the input embedding appear as
``adept_fx::`` marker ops (see :mod:`adept_fx.intercept`).
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from adept_fx.errors import CaptureError, UnsupportedModelError
from adept_fx.graph import meta
from adept_fx.graph.opaque import call_by_function, is_opaque, standing_in
from adept_fx.graph.symbols import Symbols
from adept_fx.intercept import CaptureCache, MaskCall, Recorder, cache_kinds, intercepted
from adept_fx.ops.attention import AttentionCall
from adept_fx.ops.mixer import MixerCall
from adept_fx.trace import Form, trace


@dataclass
class TensorRef:
    """A parameter, buffer or constant of the decoder, looked up in its module at every call.

    The modules stay the truth: the graph owns no tensor, so ``.to()`` and ``load_state_dict``
    are seen without recapture.
    """

    name: str
    table: dict[str, Tensor | None] = field(repr=False)
    key: str

    def get(self) -> Tensor:
        """The tensor as the module holds it now."""
        tensor = self.table[self.key]
        if tensor is None:
            raise CaptureError(f"{self.name} was removed from the model after the capture")
        return tensor


@dataclass
class Capture:
    """A captured decoder.

    Attributes:
        graph: The flat graph; tensors of the model are placeholders with ``NodeMeta.source``.
        symbols: The symbols of its shapes.
        sources: Where each such placeholder finds its tensor.
        attentions: Recorded attention calls, indexed by the marker ops.
        masks: Recorded mask calls, indexed by the marker ops.
        mixers: Recorded calls of modules with recurrent state, indexed by the marker ops.
        output_type: Class of the decoder's output.
        positions: Whether the caller passes ``position_ids``.
        kinds: The kind of each cache layer.
    """

    graph: fx.GraphModule
    symbols: Symbols
    sources: dict[str, TensorRef]
    attentions: list[AttentionCall]
    masks: list[MaskCall]
    mixers: list[MixerCall]
    output_type: type
    positions: bool
    kinds: dict[int, str]


def accepts(decoder: nn.Module, name: str) -> bool:
    """Whether the decoder's own forward has a parameter of that name."""
    return name in inspect.signature(type(decoder).forward).parameters


def capture(
    decoder: nn.Module,
    *,
    positions: bool,
    extras: Mapping[str, Tensor] | None = None,
    embeds: bool = False,
) -> Capture:
    """Captures the decoder in its present mode, dtype and device.

    Args:
        decoder: A decoder of transformers, as ``get_decoder()`` returns it.
        positions: Trace the form in which the caller passes ``position_ids``.
        extras: Further arguments that the caller passes, one entry per token, ``[B, S, ...]``;
            only their dtypes and what follows ``[B, S]`` of their shapes matter.
        embeds: Trace the form in which the caller passes ``inputs_embeds``. The graph starts from
            them either way; some decoders take certain arguments only in one form.

    Returns:
        The captured graph with everything that was recorded beside it.

    Raises:
        CaptureError: ``torch.export`` cannot trace the decoder.
        UnsupportedModelError: The decoder does something that has no place in a graph.
    """
    recorder = Recorder()
    form = Form(positions, dict(extras or {}), embeds)
    with torch.no_grad(), standing_in(decoder), intercepted(decoder, recorder):
        program, symbols = trace(decoder, recorder, form)
    if recorder.embeds != 1:
        raise CaptureError(
            f"the input embedding was called {recorder.embeds} times in one forward",
            hint="get_input_embeddings() must name the module that embeds input_ids",
        )
    program = _functional(program)
    written = sorted(program.graph_signature.buffers_to_mutate.values())
    if written:
        raise UnsupportedModelError(
            f"the decoder writes to its own buffers in its forward: {', '.join(written)}",
            hint="only decoders that keep nothing between calls but the cache are supported",
        )
    cache = CaptureCache(decoder.config, recorder)
    return Capture(
        graph=program.graph_module,
        symbols=symbols,
        sources=_sources(program, decoder),
        attentions=list(recorder.attentions),
        masks=list(recorder.masks),
        mixers=list(recorder.mixers),
        output_type=recorder.output_type or tuple,
        positions=positions,
        kinds=cache_kinds(decoder.config, cache),
    )


def _functional(program: ExportedProgram) -> ExportedProgram:
    """Functionalizes the graph if something in it writes in place.

    Decomposing costs more than the export itself, so a functional graph is left alone: it then
    holds exactly the ops that the module called.
    """
    mutates = any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for node in program.graph.nodes
        if node.op == "call_function"
    )
    return program.run_decompositions({}) if mutates else program


def _sources(program: ExportedProgram, decoder: nn.Module) -> dict[str, TensorRef]:
    """Finds the module and name behind every lifted tensor, and notes it on the placeholder."""
    opaque: dict[fx.Node, str] = {}
    signature = program.graph_signature
    named = signature.inputs_to_parameters | signature.inputs_to_buffers
    constants = signature.inputs_to_lifted_tensor_constants
    sources: dict[str, TensorRef] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in named:
            name = named[node.name].removeprefix("decoder.")
            path, _, key = name.rpartition(".")
            module = decoder.get_submodule(path)
            table: Any = module._parameters if key in module._parameters else module._buffers
            sources[node.name] = TensorRef(name, table, key)
            if is_opaque(table[key]):
                opaque[node] = type(table[key]).__name__
        elif node.name in constants:
            name = constants[node.name]
            sources[node.name] = TensorRef(name, {name: program.constants[name]}, name)
        if node.name in sources:
            meta.update(node, source=sources[node.name].name)
    call_by_function(program.graph, opaque)
    return sources
