"""``adept_fx.explain``: what ``transform`` would do, without doing it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from adept_fx.config import ExitConfig
from adept_fx.errors import AdeptError
from adept_fx.gates.base import Gate
from adept_fx.inspect_model import find_decoder
from adept_fx.model_facts import layer_count
from adept_fx.report.explanation import Explanation
from adept_fx.report.facts import Refusal
from adept_fx.report.weights import parameters
from adept_fx.rewrite import transform


def explain(model: nn.Module, config: ExitConfig | None = None) -> Explanation:
    """Says what ``transform(model, config)`` would make of a model, or why it refuses it.

    A dry run: ``model`` stays as it is. It needs no weights, so that a model on the meta device
    will do::

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
        print(adept_fx.explain(model))

    Args:
        model: As for :func:`adept_fx.transform`.
        config: As for :func:`adept_fx.transform`.

    Returns:
        An :class:`~adept_fx.report.explanation.Explanation`. Of a model that is refused, its
        ``refusal`` says at which step, why, and what the way out is.
    """
    try:
        with _unchanged(model, config):
            explanation: Explanation = transform(model, config).adept.explain()
            return explanation
    except AdeptError as error:
        return _refused(model, error)


@contextmanager
def _unchanged(model: Any, config: Any) -> Iterator[None]:
    """Puts back what making a handle changes: random numbers, the mode of gates passed in."""
    given = getattr(config, "gate", None)
    gates = given if isinstance(given, tuple) else (given,)
    modes = [(part, part.training) for g in gates if isinstance(g, Gate) for part in g.modules()]
    found = model.parameters() if isinstance(model, nn.Module) else ()
    devices = {parameter.device for parameter in found if parameter.is_cuda}
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for part, training in modes:
            part.training = training


def _refused(model: Any, error: AdeptError) -> Explanation:
    """As much as can be said of a model that is refused."""
    decoder, layers = None, None
    if isinstance(model, PreTrainedModel):
        with suppress(AdeptError):
            decoder = find_decoder(model)
            layers = layer_count(decoder)
    return Explanation(
        model=type(model).__name__,
        decoder=None if decoder is None else type(decoder).__name__,
        num_layers=layers,
        parameters=None if decoder is None else parameters(decoder),
        refusal=Refusal(
            step=error.step or "model",
            error=type(error).__name__,
            message=error.message,
            hint=error.hint,
        ),
    )
