"""What costs time, or is refused, in a model that ``transform`` takes."""

from collections.abc import Iterator, Sequence

from adept_fx.gates.base import Gate
from adept_fx.intercept.masks import RECURRENT
from adept_fx.pipeline import Program
from adept_fx.report import facts
from adept_fx.report.words import count, named
from adept_fx.runtime.masks import fits_rows


def notes(
    program: Program,
    layers: Sequence[facts.Layer],
    exits: Sequence[int],
    gates: Sequence[Gate],
    head: int,
) -> tuple[facts.Note, ...]:
    """All notes on a program.

    Args:
        program: The program.
        layers: Its layers.
        exits: Its exit points.
        gates: One per exit point.
        head: Number of parameters of the model's head.
    """
    asking = [e for e, gate in zip(exits, gates, strict=True) if "logits" in gate.needs]
    # The first gate on candidate tokens finds them; the others apply a few rows.
    drafts = [e for e, gate in zip(exits, gates, strict=True) if "draft" in gate.needs]
    asking = sorted({*asking, *drafts[:1]})
    slow = [*_attention(layers), *_masks(program), *_mixers(layers)]
    if asking:
        where = named("exit", asking)
        slow.append(f"{where}: the gate applies the head ({count(head)} parameters) to each token")
    return tuple(
        facts.Note(kind, text)
        for kind, texts in (("slow", slow), ("refused", _calls(program)))
        for text in texts
    )


def _attention(layers: Sequence[facts.Layer]) -> Iterator[str]:
    own = [layer.index for layer in layers if layer.own_attention]
    if own:
        where = named("layer", own)
        yield f"attention of {where} is the model's own code: no kernel can be chosen for it"


def _masks(program: Program) -> Iterator[str]:
    """By the rule that a call follows: see ``fits_rows``."""
    kernels = {
        str(mask.keywords["config"]._attn_implementation)
        for mask in program.masks.values()
        if mask.function is not RECURRENT and not fits_rows(mask, None, tokens=2)
    }
    for kernel in sorted(kernels):
        yield (
            f"masks of {kernel} attention cannot be packed: a stage runs all tokens of a call or "
            "none, unless each row has one new token and needs no mask"
        )


def _mixers(layers: Sequence[facts.Layer]) -> Iterator[str]:
    found = [layer.index for layer in layers if layer.mixer]
    if found:
        where = named("layer", found)
        yield f"the recurrent modules of {where} run on all tokens, also on those that left"


def _calls(program: Program) -> Iterator[str]:
    if "input_ids" in program.inputs:
        yield "calls with inputs_embeds alone: the decoder reads input_ids besides their embedding"
    if "attention_mask" in program.inputs:
        yield (
            "attention masks that are not 2-D, as generate passes with a static cache: the decoder "
            "computes with the 2-D one"
        )
