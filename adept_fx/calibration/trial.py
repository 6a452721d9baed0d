"""Runs texts through the model as it will run, and measures what they lose and save."""

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adept_fx.calibration.path import Recorded
from adept_fx.calibration.risks import Risk, RiskFunction, build_risk
from adept_fx.errors import UnsupportedModelError
from adept_fx.runtime.handle import Adept
from adept_fx.runtime.run import Run, Settings
from adept_fx.runtime.stats import PHASES, Stats
from adept_fx.runtime.watch import Watch

# The first half of a text must have two tokens: one alone would count as decoding.
_SHORTEST = {"prefill": 2, "decode": 4}


class Trial:
    """A model on trial.

    Args:
        ee: The model, in eval mode.
        texts: Token ids, ``[S]`` each, ``S >= 2``; at least one.
        risk: What a text loses.
        batch_size: Rows of one call.

    Raises:
        ConfigError: The model has no such risk.
        UnsupportedModelError: It has no logits.
    """

    def __init__(
        self, ee: Any, texts: Sequence[Tensor], risk: str | RiskFunction, batch_size: int
    ) -> None:
        self.ee = ee
        self.adept: Adept = ee.adept
        self.texts = texts
        self._places = "position_ids" in inspect.signature(ee.forward).parameters
        with self.adept.disabled():
            output = ee(input_ids=texts[0][None].to(ee.device), use_cache=True)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise UnsupportedModelError(
                f"{type(ee).__name__} has no logits: there is nothing to lose",
                hint="transform the model with its head",
            )
        self.is_row = logits.ndim == 2
        has_cache = getattr(output, "past_key_values", None) is not None
        self.is_language_model = has_cache and not self.is_row
        self.risk: Risk = build_risk(risk, self.is_row)
        self.risk.check(logits, self.is_language_model)
        # Without a pad token, heads refuse to say where several rows end.
        several = not self.is_row or getattr(ee.config, "pad_token_id", None) is not None
        self.batch_size = batch_size if several else 1
        self._full: dict[tuple[str, int], Tensor] = {}

    @property
    def phases(self) -> tuple[str, ...]:
        """Those that the model can run."""
        return PHASES if self.is_language_model else PHASES[:1]

    def fitting(self, phase: str) -> list[int]:
        """Which texts are long enough for a phase."""
        return [at for at, text in enumerate(self.texts) if len(text) >= _SHORTEST[phase]]

    def measure(
        self, phase: str, thresholds: tuple[float, ...], which: Sequence[int]
    ) -> tuple[Tensor, float]:
        """The losses of texts ``[n]``, in the order given, and the share of token-layers saved."""
        set_thresholds(self.adept, phase, thresholds)
        self.adept.stats = Stats(self.adept.config.exit_layers)
        losses = dict.fromkeys(which, 0.0)
        for rows in self._batches(which):
            full = self._of_full(phase, rows)
            early = self._kept(phase, rows)
            start = self._start(phase, rows)
            for row, at in enumerate(rows):
                losses[at] = self.risk.loss(early[row], full[row], self.texts[at][start:])
        stats = self.adept.stats
        saved = 1.0 - stats.needed[phase] / max(stats.total[phase], 1)
        return torch.tensor([losses[at] for at in which], dtype=torch.float64), saved

    def record(self, phase: str, which: Sequence[int]) -> Recorded:
        """What the exit points say of texts while nobody leaves in that phase."""
        recorder = _Recorder(phase)
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        total = sum(len(self.texts[at]) - self._start(phase, [at]) for at in which)
        self.adept.online = recorder
        try:
            for rows in self._batches(which):
                recorder.watches.clear()
                final = torch.cat([x.argmax(-1) for _, x in self._logits(phase, rows)], 1)
                scores, said = recorder.found(len(rows))
                if self.is_row:  # a row says what its last token says
                    scores, said = scores[..., -1:], said[..., -1:]
                count = len(self.texts[rows[0]]) - self._start(phase, rows)
                each = torch.ones(final.shape, dtype=torch.float64).flatten() / final.shape[1]
                share = each * (count / total)
                wrong = (said != final.cpu()).flatten(1)
                parts.append((scores.flatten(1), wrong, each / len(which), share))
        finally:
            self.adept.online = None
        together = [torch.cat(part, -1) for part in zip(*parts, strict=True)]
        scores, wrong, weight, share = together
        exits = self.adept.config.exit_layers
        return Recorded(scores, wrong, weight, share, exits, recorder.num_layers)

    def _start(self, phase: str, rows: Sequence[int]) -> int:
        """The first token that counts."""
        return len(self.texts[rows[0]]) // 2 if phase == "decode" else 0

    def _batches(self, which: Sequence[int]) -> Iterator[list[int]]:
        """Texts of one length each: without padding."""
        groups: dict[int, list[int]] = defaultdict(list)
        for at in which:
            groups[len(self.texts[at])].append(at)
        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _of_full(self, phase: str, rows: list[int]) -> Tensor | list[Tensor]:
        """What is kept of the whole model's logits; computed once, if it is small."""
        known = [self._full.get((phase, at)) for at in rows]
        found = [item for item in known if item is not None]
        if len(found) == len(rows):
            return found
        counted, self.adept.stats = self.adept.stats, Stats(self.adept.config.exit_layers)
        with self.adept.disabled():
            kept = self._kept(phase, rows)
        self.adept.stats = counted  # without what the whole model ran
        if self.risk.small:
            self._full.update({(phase, at): kept[row] for row, at in enumerate(rows)})
        return kept

    def _kept(self, phase: str, rows: list[int]) -> Tensor:
        ids = torch.stack([self.texts[at] for at in rows])
        following = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-1).to(self.ee.device)
        parts = []
        for start, logits in self._logits(phase, rows):
            behind = following[:, start : start + logits.shape[1]]
            kept = self.risk.keep(logits, behind if self.is_language_model else None)
            parts.append(kept.cpu() if self.risk.small else kept)
        return torch.cat(parts, 1)

    def _logits(self, phase: str, rows: list[int]) -> Iterator[tuple[int, Tensor]]:
        """Where they start, and logits ``[B, s, V]`` of the tokens that count."""
        ids = torch.stack([self.texts[at] for at in rows]).to(self.ee.device)
        if phase == "prefill":
            logits = self._call(ids, 0).logits
            yield 0, logits[:, None] if self.is_row else logits
            return
        half = ids.shape[1] // 2
        cache = self._call(ids[:, :half], 0, use_cache=True).past_key_values
        for at in range(half, ids.shape[1]):
            output = self._call(ids[:, at : at + 1], at, use_cache=True, past_key_values=cache)
            cache = output.past_key_values
            yield at, output.logits

    def _call(self, ids: Tensor, past: int, **given: Any) -> Any:
        if self._places:  # as generate does: calls without them would be captured apart
            places = torch.arange(past, past + ids.shape[1], device=ids.device)
            given["position_ids"] = places.expand(ids.shape)
        return self.ee(input_ids=ids, **given)


class _Recorder:
    """Lets nobody leave in one phase, and keeps what was seen there."""

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self.num_layers = 0
        self.watches: list[tuple[Watch, int]] = []

    def enter(self, settings: Settings, tokens: int) -> Settings:
        """Watches calls of the phase."""
        if (tokens > 1) != (self.phase == "prefill"):
            return settings
        return replace(settings, thresholds=(1.0,) * len(settings.exits), watch=Watch())

    def leave(self, adept: Adept, run: Run, hidden: Tensor) -> None:
        """Keeps what was seen."""
        if run.settings.watch is not None:
            self.num_layers = run.settings.num_layers
            self.watches.append((run.settings.watch, run.tokens))

    def found(self, batch: int) -> tuple[Tensor, Tensor]:
        """Scores and most likely tokens, ``[E, B, S]``, on the CPU."""
        scores, said = [], []
        for watch, tokens in self.watches:
            shape = (len(watch.seen), batch * tokens)
            grid, words = torch.full(shape, torch.nan), torch.full(shape, -1)
            for row, seen in enumerate(watch.seen):
                grid[row, seen.positions.cpu()] = seen.scores.cpu()
                words[row, seen.positions.cpu()] = seen.said.cpu()
            scores.append(grid.view(-1, batch, tokens))
            said.append(words.view(-1, batch, tokens))
        return torch.cat(scores, -1), torch.cat(said, -1)


def set_thresholds(adept: Adept, phase: str, values: tuple[float, ...]) -> None:
    """Sets those of one phase; the other phase keeps its own."""
    if phase == "prefill":
        adept.prefill_thresholds = values
        return
    prefill = adept.prefill_thresholds
    adept.thresholds = values  # for both phases, where the config has one threshold
    adept.prefill_thresholds = prefill
