"""The check of one model, from its config to its restored original."""

import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from adept_fx.check.conversation import (
    THRESHOLD,
    Trace,
    conversation,
    difference,
    play,
    scores,
)
from adept_fx.check.model import build
from adept_fx.check.oracle import Oracle
from adept_fx.check.result import CheckResult
from adept_fx.config import ExitConfig
from adept_fx.errors import AdeptError
from adept_fx.gates import FixedDepth, Replay
from adept_fx.inspect_model import find_decoder
from adept_fx.model_facts import layer_count
from adept_fx.rewrite import restore, transform

_TOLERANCE = 1e-5  # of a tensor's largest value, in float32
_NEW_TOKENS = 8


def check(subject: str) -> CheckResult:
    """Checks one model.

    Args:
        subject: A ``model_type``, a path, or a repository name.
    """
    start = time.perf_counter()
    facts: dict[str, Any] = {}
    steps: dict[str, str] = {}

    def result(status: Any, reason: str = "") -> CheckResult:
        return CheckResult(subject, status, reason, steps, facts, time.perf_counter() - start)

    try:
        model = build(subject)
    except Exception as error:  # whatever is wrong with the original is not ours to judge
        return result("unavailable", _line(error))
    facts["model_class"] = type(model).__name__
    broken = _complaint(model)
    try:
        examination = Examination(model)
    except AdeptError as error:
        return result("refused", _line(error))
    except Exception as error:  # a crash is what this command is to find
        return result("unavailable", broken) if broken else result("failed", _line(error))
    if broken:
        return result("unavailable", broken)
    facts |= examination.facts
    for name, step in examination.steps().items():
        try:
            steps[name] = step() or "ok"
        except Exception as error:  # as above
            steps[name] = _line(error)
    bad = [f"{name}: {text}" for name, text in steps.items() if text != "ok"]
    return result("failed", bad[0]) if bad else result("passed")


@torch.no_grad()
def _complaint(model: Any) -> str:
    """Why the original cannot read a padded prompt; empty if it can."""
    try:
        turn = conversation(_vocabulary(model))[0]
        logits = model(**turn.inputs(model)).logits
    except Exception as error:  # as above
        return _line(error)
    finite = bool(torch.isfinite(logits[turn.real]).all())
    return "" if finite else "the original's logits are not finite"


def _layer_kinds(decoder: Any) -> list[str]:
    """The kinds of layers by the config, else by the cache that the decoder gets."""
    declared = getattr(decoder.config, "layer_types", None)
    if declared:
        return sorted(set(declared))
    sliding = DynamicCache(config=decoder.config).is_sliding
    return sorted({"sliding_attention" if flag else "full_attention" for flag in sliding})


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:400] if isinstance(error, AdeptError) else f"{type(error).__name__}: {text[:300]}"


class Examination:
    """A rewritten model beside its original.

    Args:
        model: The original.

    Raises:
        AdeptError: ``transform`` refuses the model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.turns = conversation(_vocabulary(model))
        decoder = find_decoder(model)
        layers = layer_count(decoder)
        self.exits = tuple(sorted({max(1, layers // 3), max(1, layers - 1 - layers // 4)}))
        self.scores = scores(self.turns, len(self.exits))
        config = ExitConfig(exits=self.exits, gate=Replay([]), threshold=1.0)
        self.ee = transform(model, config)
        self.facts = {
            "decoder_class": type(decoder).__name__,
            "layers": layers,
            "exits": list(self.exits),
            "layer_kinds": _layer_kinds(decoder),
        }

    def steps(self) -> dict[str, Callable[[], str]]:
        """The steps by name; each says what is wrong, or nothing."""
        return {
            "off": self._off,
            "exits": self._exits,
            "generate": self._generate,
            "restore": self._restore,
        }

    @cached_property
    def original(self) -> Trace:
        """The original's side of the conversation."""
        return play(self.model, self.turns)

    def _play(self, plan: str, threshold: float) -> Trace:
        adept = self.ee.adept
        adept.set_gates(Replay(self.scores))
        adept.plan = plan
        adept.thresholds = threshold
        return play(self.ee, self.turns)

    def _off(self) -> str:
        for plan, tolerance in (("dense", 0.0), ("auto", _TOLERANCE)):
            got = self._play(plan, 1.0)
            found = difference(got, self.original, self.turns, tolerance)
            if found:
                return f"plan {plan}: {found}"
        return ""

    def _exits(self) -> str:
        oracle = Oracle(self.model, self.exits)

        def around(index: int) -> AbstractContextManager[None]:
            return oracle.leaving(self.scores[index] > THRESHOLD, self.turns[index].real)

        want = play(self.model, self.turns, around)
        if not difference(want, self.original, self.turns, 1e-3):
            return "leaving early changes nothing in this model: nothing was checked"
        for plan in ("dense", "compact", "auto"):
            got = self._play(plan, THRESHOLD)
            found = difference(got, want, self.turns, _TOLERANCE)
            if found:
                return f"plan {plan}: {found}"
        return ""

    def _generate(self) -> str:
        adept = self.ee.adept
        adept.set_gates(FixedDepth(0))  # wants every token out, at a threshold that lets none
        adept.plan = "dense"
        adept.thresholds = 1.0
        want, got = self._generated(self.model), self._generated(self.ee)
        return "" if torch.equal(got, want) else "greedy tokens differ from the original's"

    def _generated(self, model: Any) -> Tensor:
        turn = self.turns[0]
        tokens: Tensor = model.generate(
            input_ids=turn.ids,
            attention_mask=turn.seen.long(),
            max_new_tokens=_NEW_TOKENS,
            min_new_tokens=_NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        return tokens

    def _restore(self) -> str:
        restored = restore(self.ee)
        if type(restored) is not type(self.model):
            return f"restore gave a {type(restored).__name__}"
        found = difference(play(restored, self.turns), self.original, self.turns, 0.0)
        if found:
            return f"restored: {found}"
        with tempfile.TemporaryDirectory() as folder:
            self.ee.save_pretrained(folder)
            loaded = type(self.model).from_pretrained(folder, dtype=torch.float32).eval()
        # Memory of another alignment may round otherwise.
        found = difference(play(loaded, self.turns), self.original, self.turns, _TOLERANCE)
        return f"saved and loaded: {found}" if found else ""
