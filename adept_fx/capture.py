"""Step 1 of the pipeline: a Hugging Face decoder becomes one flat FX graph.

``torch.export`` (non-strict) with symbolic batch, new tokens, cached rows, past length and one
key length per kind of layer. Cache writes, masks, attention and the input embedding appear as
``adept_fx::`` marker ops (see :mod:`adept_fx.intercept`).
"""

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from adept_fx.errors import AdeptError, CaptureError, UnsupportedModelError
from adept_fx.graph import meta
from adept_fx.graph.opaque import call_by_function, is_opaque, standing_in
from adept_fx.graph.symbols import Symbols, expression
from adept_fx.intercept import FULL, CaptureCache, MaskCall, Recorder, cache_kinds, intercepted
from adept_fx.intercept.mixers import MixerFoundError
from adept_fx.ops.attention import AttentionCall
from adept_fx.ops.mixer import MixerCall

# Hints for the symbols. Distinct, so that no two symbols are taken for one; above 1, because
# export specializes 0 and 1; the 2-D mask is as long as the keys, as in every real call.
_BATCH, _TOKENS, _PAST, _ROWS = 3, 5, 7, 17
_KEYS = _TOKENS + _PAST


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


class _Entry(nn.Module):
    """The function that is traced: the decoder's forward with a cache that records."""

    def __init__(self, decoder: nn.Module, recorder: Recorder) -> None:
        super().__init__()
        self.decoder = decoder
        self.recorder = recorder

    def forward(
        self,
        input_ids: Tensor | None,
        embedded: Tensor | None,
        attention_mask: Tensor,
        past: Tensor,
        slots: dict[str, Tensor],
        position_ids: Tensor | None = None,
        extras: dict[str, Tensor] | None = None,
    ) -> Tensor:
        recorder = self.recorder
        recorder.start(past, slots)
        keywords = {} if position_ids is None else {"position_ids": position_ids}
        embeds = None
        if embedded is not None:
            embeds = torch.ops.adept_fx.embed(embedded)
            recorder.embeds += 1
        output = self.decoder(
            input_ids=input_ids,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            past_key_values=CaptureCache(self.decoder.config, recorder),
            use_cache=True,
            return_dict=True,
            **keywords,
            **(extras or {}),
        )
        recorder.output_type = type(output)
        hidden: Tensor = output.last_hidden_state
        return hidden


@dataclass(frozen=True)
class _Form:
    """Which arguments a call has."""

    positions: bool
    extras: dict[str, Tensor]
    embeds: bool


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
    form = _Form(positions, dict(extras or {}), embeds)
    with torch.no_grad(), standing_in(decoder), intercepted(decoder, recorder):
        # Rows of the cache are their own symbol; a decoder that computes attention itself, with
        # the batch size in its reshapes, needs them tied to the batch.
        try:
            with _quiet():
                program, symbols = _export(decoder, recorder, form, rows=_ROWS)
        except AdeptError:
            raise
        except Exception:  # export raises anything; the second try tells
            program, symbols = _export_tied(decoder, recorder, form)
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch from logging a failure that the second try may mend."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _export_tied(
    decoder: nn.Module, recorder: Recorder, form: _Form
) -> tuple[ExportedProgram, Symbols]:
    try:
        return _export(decoder, recorder, form, rows=_BATCH)
    except AdeptError:
        raise
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot trace {type(decoder).__name__}: {error}",
            hint="the decoder must be exportable with symbolic batch and length",
        ) from error


def _export(
    decoder: nn.Module, recorder: Recorder, form: _Form, rows: int
) -> tuple[ExportedProgram, Symbols]:
    device = decoder.get_input_embeddings().weight.device  # type: ignore[operator]
    kinds = (FULL, "chunked_attention", "sliding_attention")
    ids = torch.zeros(_BATCH, _TOKENS, dtype=torch.long, device=device)
    weight = decoder.get_input_embeddings().weight  # type: ignore[operator]
    embeds = weight.new_zeros(_BATCH, _TOKENS, weight.shape[1]) if form.embeds else None
    example: dict[str, Any] = {
        "input_ids": None if form.embeds else ids,
        "embedded": embeds,
        "attention_mask": torch.ones(_BATCH, _KEYS, dtype=torch.long, device=device),
        "past": torch.zeros(_PAST, device=device),
        # Each kind has its own length; the full one equals the 2-D mask's.
        "slots": {
            kind: torch.zeros(rows, _KEYS + (index and 6 + 7 * index), device=device)
            for index, kind in enumerate(kinds)
        },
    }
    if form.positions:
        example["position_ids"] = torch.zeros_like(ids)
    if form.extras:
        example["extras"] = {
            name: value.new_zeros(_BATCH, _TOKENS, *value.shape[2:])
            for name, value in form.extras.items()
        }
    # Where cached rows are tied to the batch, they share its symbol.
    batch = Dim("batch", min=2) if rows == _BATCH else Dim.DYNAMIC
    free: dict[int, Any] = {0: batch, 1: Dim.DYNAMIC}
    shapes: dict[str, Any] = {k: None if v is None else free for k, v in example.items()}
    shapes["past"] = {0: Dim.DYNAMIC}
    if form.extras:
        shapes["extras"] = dict.fromkeys(form.extras, free)
    same = free if rows == _BATCH else {0: Dim("rows", min=2), 1: Dim.DYNAMIC}
    shapes["slots"] = dict.fromkeys(example["slots"], same)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = _restarting(
            lambda: torch.export.export(
                _Entry(decoder, recorder), (), example, dynamic_shapes=shapes, strict=False
            )
        )
    return program, _symbols(program, example)


def _restarting(export: Callable[[], ExportedProgram]) -> ExportedProgram:
    """Exports anew for each kind of module that turns out to keep recurrent state."""
    while True:
        try:
            return export()
        except MixerFoundError:
            continue  # each adds a class to the recorder, so this ends


def _symbols(program: ExportedProgram, example: dict[str, Any]) -> Symbols:
    values = {node.name: node.meta["val"] for node in program.graph.find_nodes(op="placeholder")}
    ids = values["embedded" if example["input_ids"] is None else "input_ids"]
    batch, tokens = (expression(size) for size in ids.shape[:2])
    slots = [values[f"slots_{kind}"] for kind in example["slots"]]
    return Symbols(
        batch=batch,
        tokens=tokens,
        rows=expression(slots[0].shape[0]),
        past=expression(values["past"].shape[0]),
        keys=frozenset(expression(probe.shape[1]) for probe in slots),
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
