"""``adept_fx.calibrate``."""

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from adept_fx.calibration.certify import Certifier
from adept_fx.calibration.online import BetaMixture
from adept_fx.calibration.report import verdict
from adept_fx.calibration.result import Calibration
from adept_fx.calibration.risks import RiskFunction
from adept_fx.calibration.statistics import BOUNDS
from adept_fx.calibration.trial import Trial, set_thresholds
from adept_fx.errors import ConfigError, InputError, UnsupportedModelError
from adept_fx.runtime.handle import Adept
from adept_fx.runtime.stats import Stats
from adept_fx.texts import texts_of


def calibrate(
    ee: Any,
    dataset: Iterable[Any],
    *,
    target: float = 0.97,
    risk: str | RiskFunction = "agreement",
    confidence: float = 0.95,
    phase: str | None = None,
    length: int = 256,
    batch_size: int = 8,
    bound: str = "hoeffding-bentkus",
    online: str | None = None,
    seed: int = 0,
) -> Calibration:
    """Finds thresholds that save most, and keep a promise: ``P(risk <= 1 - target) >= confidence``.

    Learn then Test (Angelopoulos et al. 2021, arXiv:2110.01052): a third of the texts chooses a
    sequence of thresholds, from those that save little to those that seem just good enough; the
    others test them one by one, until one fails. The last that passed are set. Whatever is tested
    has run on the model as it will run: compiled, quantized, by its plan.

    The promise holds for texts drawn like those of the dataset, for each phase by itself, and as
    long as the model stays what it was. A text is a sample: the risk is the mean over texts of a
    loss in [0, 1] that is a mean over its tokens. Where long items are cut into several texts,
    those must be about as different from each other as items are.

    Args:
        ee: A model returned by :func:`adept_fx.transform`. Thresholds of the other phase, its
            statistics and its mode stay as they are; an adapter in ``ee.adept.online`` is
            detached.
        dataset: Text like that which the model will serve: a ``datasets.Dataset`` with
            ``input_ids``, or any iterable of token ids (lists or tensors), without padding. All of
            it is used.
        target: One minus the largest risk, in (0, 1).
        risk: A text's loss. ``"agreement"``: share of its tokens whose most likely next token is
            not that of the whole model (``ee.adept.disabled()``). ``"nll"``: by what share its mean
            negative log-likelihood is above the whole model's, at most 1. Or a function
            ``f(early_logits [S, V], full_logits [S, V], ids [S])`` that returns a number in
            [0, 1], for the ``S`` tokens of a text that count in the phase. Of a sequence
            classifier, ``"agreement"`` compares the row's class, and a function is given
            ``[classes]`` logits and all ids.
        confidence: Probability, over the texts drawn, that a phase's promise holds, in (0, 1).
        phase: ``"prefill"``: texts run in one call; sets ``ee.adept.prefill_thresholds``.
            ``"decode"``: the first half of a text is prefilled, with the prefill thresholds as they
            are, the other half fed token by token; only those count; sets
            ``ee.adept.thresholds``. None: both, prefill first, or what the model can do. What
            prefill changes about the keys that later tokens read is part of the risk of decoding:
            where it takes all of it, set ``ee.adept.prefill_thresholds`` higher and calibrate
            ``"decode"`` again.
        length: Longest text, in tokens; longer items give several.
        batch_size: Rows of one call; texts of equal length share calls.
        bound: ``"hoeffding-bentkus"``, or ``"betting"`` (Waudby-Smith & Ramdas, arXiv:2010.09686),
            which promises more where the losses of texts vary little.
        online: ``"beta-mixture"`` leaves a :class:`~adept_fx.calibration.online.BetaMixture` in
            ``ee.adept.online``, which goes on moving the thresholds, without any promise.
        seed: Chooses the texts that choose.

    Returns:
        Per phase the thresholds, what they save, the promise, and the candidates; ``print`` shows
        them. ``ee.adept.calibration`` holds the same as JSON types.

    Raises:
        ConfigError: An argument makes no sense, or not for this model; or the function of the
            caller does not return a number in [0, 1].
        InputError: The dataset holds no token ids.
        UnsupportedModelError: The model was not transformed, or has no logits.

    Warns:
        UserWarning: The texts cannot support the promise for a phase: its thresholds are 1.0.
    """
    adept = getattr(ee, "adept", None)
    if not isinstance(adept, Adept):
        raise UnsupportedModelError("this model was not made by adept_fx.transform")
    _check(adept, target, confidence, phase, length, batch_size, bound, online)
    texts = list(texts_of(dataset, sys.maxsize, length))
    if not texts:
        raise InputError("the dataset is empty", hint="give texts of at least two tokens")
    with _on_trial(ee, adept):
        trial = Trial(ee, texts, risk, batch_size)
        names = _phases(trial, phase, online)
        certifier = Certifier(trial, 1.0 - target, 1.0 - confidence, bound, seed)
        parts = tuple(certifier.run(name) for name in names)
    exits = adept.config.exit_layers
    found = Calibration(target, confidence, trial.risk.name, bound, exits, parts)
    for part in parts:
        set_thresholds(adept, part.phase, part.thresholds)
        if not part.certified:
            warnings.warn(verdict(found, part), UserWarning, stacklevel=2)
    adept.calibration = found.to_dict()
    if online is not None:
        adept.online = BetaMixture(target, {part.phase: part.thresholds for part in parts})
    return found


@contextmanager
def _on_trial(ee: Any, adept: Adept) -> Iterator[None]:
    """Nothing of the model changes in here but thresholds, and those not if an error leaves it."""
    training = [module for module in ee.modules() if module.training]
    kept = adept.stats, adept.last_depth, adept.online
    before = adept.thresholds, adept.prefill_thresholds
    adept.online, adept.stats = None, Stats(adept.config.exit_layers)
    ee.eval()
    try:
        with torch.no_grad():
            yield
    except BaseException:
        adept.thresholds, adept.prefill_thresholds = before
        adept.online = kept[2]
        raise
    finally:
        for module in training:
            module.training = True
        adept.stats, adept.last_depth = kept[:2]


def _phases(trial: Trial, phase: str | None, online: str | None) -> tuple[str, ...]:
    kind = type(trial.ee).__name__
    if phase is not None and phase not in trial.phases:
        raise ConfigError(f"{kind} does not decode: it has no cache", hint="use phase='prefill'")
    if online is not None and not trial.is_language_model:
        raise ConfigError(f"online={online!r} needs a language model, not {kind}")
    return trial.phases if phase is None else (phase,)


def _check(
    adept: Adept,
    target: float,
    confidence: float,
    phase: str | None,
    length: int,
    batch_size: int,
    bound: str,
    online: str | None,
) -> None:
    for name, value in (("target", target), ("confidence", confidence)):
        if not 0.0 < value < 1.0:
            raise ConfigError(f"{name}={value} must be between 0 and 1, and neither of them")
    if length < 2 or batch_size < 1:
        raise ConfigError(f"length={length} must be at least 2, batch_size={batch_size} at least 1")
    for name, given, known in (
        ("phase", phase, (None, "prefill", "decode")),
        ("bound", bound, BOUNDS),
        ("online", online, (None, "beta-mixture")),
    ):
        if given not in known:
            words = ", ".join(map(repr, known))
            raise ConfigError(f"{name} cannot be {given!r}", hint=f"known: {words}")
    if adept.exits_are_off:
        raise ConfigError("calibrate inside of disabled(): no token can leave")
