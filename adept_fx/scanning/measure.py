"""``adept_fx.scan``."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from adept_fx.errors import ConfigError, InputError
from adept_fx.inspect_model import find_decoder
from adept_fx.model_facts import layer_count
from adept_fx.scanning.probe import Seen, look
from adept_fx.scanning.proposal import propose
from adept_fx.scanning.result import Layer, Scan
from adept_fx.texts import texts_of

_POINTS = 16
_TARGETS = (0.99, 0.97, 0.95, 0.90)


def scan(
    model: Any,
    dataset: Iterable[Any],
    *,
    exits: Sequence[int] | None = None,
    tokens: int = 8192,
    length: int = 512,
) -> Scan:
    """Says, before any training, whether early exit is worth it for a model.

    Every token of some text is asked, at every exit point, what it would say if it left there,
    through the model's own norm and head (the "logit lens", nostalgebraist 2020). That is compared
    with what it says in the end. The model is not changed.

    Args:
        model: A causal language model, not rewritten.
        dataset: Text like that which the model will serve: a ``datasets.Dataset`` with
            ``input_ids``, or any iterable of token ids (lists or tensors).
        exits: Exit points to look at; all, if the model has at most 17 layers, else 16 of them.
        tokens: How many tokens to look at.
        length: Longest piece of text.

    Returns:
        Agreement, divergence and loss per exit point, and proposals; ``print`` shows them.

    Raises:
        ConfigError: An argument makes no sense.
        InputError: The dataset holds no token ids, or too few.
        UnsupportedModelError: :func:`adept_fx.transform` refuses the model.
    """
    if hasattr(model, "adept"):
        raise ConfigError("scan takes the plain model", hint="adept_fx.restore(ee)")
    if tokens < 2 or length < 2:
        raise ConfigError(f"tokens={tokens} and length={length} must be at least 2")
    layers = layer_count(find_decoder(model))
    points = _points(layers) if exits is None else tuple(exits)
    texts = list(texts_of(dataset, tokens, length))
    if not texts:
        raise InputError("the dataset is empty", hint="give texts of at least two tokens")
    seen = look(model, texts, points)
    return _result(seen, points, layers)


def _points(layers: int) -> tuple[int, ...]:
    """All exit points, or some at even distances."""
    count = min(layers - 1, _POINTS)
    return tuple(sorted({round(layers * at / (count + 1)) for at in range(1, count + 1)}))


def _result(seen: Seen, exits: tuple[int, ...], num_layers: int) -> Scan:
    agrees = seen.agrees
    before = torch.cat((torch.zeros_like(agrees[:1]), agrees[:-1])).cummax(0).values
    earliest = (agrees & ~before).double().mean(1)
    layers = tuple(
        Layer(
            after=after,
            agreement=float(agrees[row].double().mean()),
            divergence=float(seen.divergence[row].double().mean()),
            loss=float(seen.loss[row].double().mean()),
            earliest=float(earliest[row]),
        )
        for row, after in enumerate(exits)
    )
    perfect = sum(item.earliest * (num_layers - item.after) / num_layers for item in layers)
    proposals = tuple(
        propose(agrees, seen.confidence, exits, num_layers, target) for target in _TARGETS
    )
    loss = float(seen.final_loss.double().mean())
    return Scan(layers, num_layers, agrees.shape[1], loss, perfect, proposals)
