"""Exports a decoder with symbolic sizes."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from adept_fx.errors import AdeptError, CaptureError
from adept_fx.graph.symbols import Symbols, expression
from adept_fx.intercept import FULL, CaptureCache, Recorder
from adept_fx.intercept.mixers import MixerFoundError

# Hints for the symbols. Distinct, so that no two symbols are taken for one; above 1, because
# export specializes 0 and 1; the 2-D mask is as long as the keys, as in every real call.
_BATCH, _TOKENS, _PAST, _ROWS = 3, 5, 7, 17
_KEYS = _TOKENS + _PAST


@dataclass(frozen=True)
class Form:
    """Which arguments a call has.

    Attributes:
        positions: It passes ``position_ids``.
        extras: Further arguments with one entry per token, ``[B, S, ...]``.
        embeds: It passes ``inputs_embeds``.
    """

    positions: bool
    extras: dict[str, Tensor]
    embeds: bool


class _Entry(nn.Module):
    """The function that is traced: the decoder's forward with a cache that records."""

    def __init__(self, decoder: nn.Module, recorder: Recorder) -> None:
        super().__init__()
        self.decoder = decoder
        self.recorder = recorder

    def forward(
        self,
        attention_mask: Tensor,
        past: Tensor,
        slots: dict[str, Tensor],
        input_ids: Tensor | None = None,
        embedded: Tensor | None = None,
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


def trace(decoder: nn.Module, recorder: Recorder, form: Form) -> tuple[ExportedProgram, Symbols]:
    """Exports the decoder's forward with a cache that records.

    Rows of the cache are a symbol of their own; a decoder that computes attention itself, with
    the batch size in its reshapes, needs them tied to the batch.

    Raises:
        CaptureError: ``torch.export`` cannot trace the decoder.
    """
    try:
        with _quiet():
            return _export(decoder, recorder, form, rows=_ROWS)
    except AdeptError:
        raise
    except Exception:  # export raises anything; the second try tells
        return _export_tied(decoder, recorder, form)


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
    decoder: nn.Module, recorder: Recorder, form: Form
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
    decoder: nn.Module, recorder: Recorder, form: Form, rows: int
) -> tuple[ExportedProgram, Symbols]:
    weight = decoder.get_input_embeddings().weight  # type: ignore[operator]
    device = weight.device
    kinds = (FULL, "chunked_attention", "sliding_attention")
    ids = torch.zeros(_BATCH, _TOKENS, dtype=torch.long, device=device)
    example: dict[str, Any] = {
        "attention_mask": torch.ones(_BATCH, _KEYS, dtype=torch.long, device=device),
        "past": torch.zeros(_PAST, device=device),
        # Each kind has its own length; the full one equals the 2-D mask's.
        "slots": {
            kind: torch.zeros(rows, _KEYS + (index and 6 + 7 * index), device=device)
            for index, kind in enumerate(kinds)
        },
    }
    if form.embeds:
        example["embedded"] = weight.new_zeros(_BATCH, _TOKENS, weight.shape[1])
    else:
        example["input_ids"] = ids
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
    shapes: dict[str, Any] = dict.fromkeys(example, free)
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
    ids = values["input_ids" if "input_ids" in example else "embedded"]
    batch, tokens = (expression(size) for size in ids.shape[:2])
    slots = [values[f"slots_{kind}"] for kind in example["slots"]]
    return Symbols(
        batch=batch,
        tokens=tokens,
        rows=expression(slots[0].shape[0]),
        past=expression(values["past"].shape[0]),
        keys=frozenset(expression(probe.shape[1]) for probe in slots),
    )
