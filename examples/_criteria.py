"""Exit criteria of the literature, on one model with one set of exits: fit, calibrate, measure."""

from __future__ import annotations

import io
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import adept_fx
from adept_fx import AdeptError, FitConfig
from adept_fx.calibration.statistics import fixed_sequence
from adept_fx.gates import (
    MLP,
    AttentionMLP,
    Cosine,
    DraftTokens,
    Entropy,
    Gate,
    GateInputs,
    MaxProb,
    Replay,
    Schedule,
    TopGap,
)
from adept_fx.gates.base import DRAFT_SIZE

_SURE = 0.5  # a threshold for gates that score 0 or 1
_SELECT = 3  # one calibration text of so many chooses a schedule, as in adept_fx.calibrate
_CANDIDATES = 16


@dataclass(frozen=True)
class Criterion:
    """What a gate looks at, and who proposed that.

    Attributes:
        name: For the table.
        paper: Names and arXiv numbers.
        make: Makes the gate of one exit point from the hidden size.
        objective: What it is trained towards; None if it has nothing to learn.
    """

    name: str
    paper: str
    make: Callable[[int], Gate]
    objective: str | None = None


CRITERIA = (
    Criterion("max probability", "Schwartz et al. 2004.07453", lambda width: MaxProb()),
    Criterion("top-2 gap", "CALM 2207.07061, FREE 2310.05424", lambda width: TopGap()),
    Criterion("entropy", "DeeBERT 2004.12993, Valade 2407.21082", lambda width: Entropy()),
    Criterion("draft tokens", "SpecEE 2504.08850", lambda width: DraftTokens(), "agreement"),
    Criterion("MLP, agreement", "CALM 2207.07061", MLP, "agreement"),
    Criterion("MLP, preference", "ADEPT 2601.03700, objective", MLP, "adept"),
    Criterion("cosine saturation", "CALM 2207.07061, MuE 2211.11152", lambda width: Cosine()),
    Criterion("MLP on h, q, k, v", "ADEPT 2601.03700, state", AttentionMLP, "agreement"),
)
"""Those that have a threshold. A schedule has none, and is added to the table apart.

Gates that ask for more of the graph come last: each other set of wishes is another capture.
"""

SCHEDULE = "position schedule"
NOBODY = "nobody leaves"
HERE = "no mistakes: agrees here"
FROM_HERE = "no mistakes: agrees from here on"
REFERENCES = (HERE, FROM_HERE, NOBODY)


@dataclass(frozen=True)
class Budget:
    """How much is trained, and what is promised.

    Attributes:
        target: Next-token agreement.
        confidence: Of the promise that it is reached.
        adapter_steps: Training steps of the exit adapters, which all criteria share.
        gate_steps: Training steps of each trained gate.
        batch: Texts per call, in calibration and measurement.
        fit_batch: Texts per training step.
        rounds: Timings of a gate, whose median counts.
        seed: Of everything random.
    """

    target: float = 0.97
    confidence: float = 0.95
    adapter_steps: int = 200
    gate_steps: int = 200
    batch: int = 32
    fit_batch: int = 8
    rounds: int = 15
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """What came of a criterion.

    Attributes:
        name: As in `CRITERIA`, or `SCHEDULE`, or one of `REFERENCES`.
        paper: Names and arXiv numbers; empty for references.
        parameters: Of one exit point's gate.
        saved: Share of the test texts' token-layers that no token needed.
        agreement: Share of the test tokens that say what the whole model says.
        nll_ratio: Negative log-likelihood by that of the whole model.
        cost: Microseconds per token and exit point; None where there is no gate.
        promised: Whether calibration could promise the target; None for references.
        thresholds: One per exit point.
        options: Of a schedule.
        fit_seconds: Training; 0 if there was none.
        saved_by_text: The same as `saved` of every test text.
    """

    name: str
    paper: str
    parameters: int
    saved: float
    agreement: float
    nll_ratio: float
    cost: float | None = None
    promised: bool | None = None
    thresholds: tuple[float, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    fit_seconds: float = 0.0
    saved_by_text: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Said:
    """What texts `[n, S]` make a model say.

    Attributes:
        tokens: The most likely next tokens, `[n, S]`.
        nll: Mean negative log-likelihood of the next token.
        saved: Share of the token-layers that no token needed, counted by `ee.adept.stats`.
        by_text: The same per text, `[n]`.
    """

    tokens: Tensor
    nll: float
    saved: float
    by_text: Tensor


class Notes(Gate):
    """Lets nobody leave, and keeps something of what every exit point sees."""

    keeps_python_state = True

    def __init__(self, needs: Iterable[str], keep: Callable[[GateInputs], Any]) -> None:
        super().__init__()
        self.needs = frozenset(needs)
        self.keep = keep
        self.kept: list[Any] = []

    def forward(self, tokens: GateInputs) -> Tensor:
        """Scores 0."""
        self.kept.append(self.keep(tokens))
        return tokens.hidden.new_zeros(len(tokens.hidden), dtype=torch.float32)


def call(ee: Any, texts: Tensor) -> Any:
    """Calls the model as `adept_fx.calibrate` does: another form of call is another capture."""
    places = torch.arange(texts.shape[1], device=texts.device).expand(texts.shape)
    return ee(input_ids=texts, position_ids=places, use_cache=False)


@torch.no_grad()
def read(ee: Any, texts: Tensor, batch: int) -> Said:
    """Reads texts `[n, S]`, each in one call, and notes what is said of the next tokens."""
    ee.adept.stats.reset()
    said, depths, loss = [], [], 0.0
    for rows in texts.split(batch):
        logits = call(ee, rows).logits.float()
        loss += float(
            cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
        )
        said.append(logits.argmax(-1).cpu())
        depths.append(ee.adept.last_depth.double().mean(1).cpu())
    stats = ee.adept.stats
    saved = 1 - stats.needed["prefill"] / stats.total["prefill"]
    by_text = 1 - torch.cat(depths) / ee.adept.num_layers
    return Said(torch.cat(said), loss / texts[:, 1:].numel(), saved, by_text)


@torch.no_grad()
def said_at_exits(ee: Any, texts: Tensor, batch: int) -> Tensor:
    """The most likely next token at every exit point while nobody leaves, `[exits, n, S]`."""

    def most_likely(tokens: GateInputs) -> Tensor:
        grid = torch.full(tokens.batch_shape, -1)
        place = tokens.batch_index.cpu(), tokens.token_index.cpu()
        grid[place] = tokens.need("logits").argmax(-1).cpu()
        return grid

    notes, parts = Notes({"logits"}, most_likely), []
    ee.adept.set_gates(notes)
    ee.adept.prefill_thresholds = _SURE
    for rows in texts.split(batch):
        notes.kept.clear()
        call(ee, rows)
        parts.append(torch.stack(notes.kept))
    return torch.cat(parts, 1)


def perfect(agrees: Tensor, batch: int, from_here: bool) -> Replay:
    """A gate that lets a token leave where it already says what the whole model says.

    Args:
        agrees: Whether it does, `[exits, n, S]`.
        batch: Texts per call.
        from_here: Only where it also does so at all later exit points.
    """
    good = agrees.flip(0).cummin(0).values.flip(0) if from_here else agrees
    return Replay([part.contiguous() for part in good.float().split(batch, dim=1)])


@torch.no_grad()
def inputs_of(ee: Any, gates: Sequence[Gate], texts: Tensor) -> list[GateInputs]:
    """What the gates are given of some texts, one entry per exit point; without logits."""
    notes = [Notes(gate.needs - {"logits", "draft"}, lambda tokens: tokens) for gate in gates]
    ee.adept.set_gates(notes)
    ee.adept.prefill_thresholds = _SURE
    call(ee, texts)
    ee.adept.set_gates(gates)
    return [note.kept[0] for note in notes]


@torch.no_grad()
def score(adept: Any, gates: Sequence[Gate], inputs: Sequence[GateInputs]) -> None:
    """Asks all gates, and computes the logits that they ask for."""
    chosen = before = None
    for index, (gate, tokens) in enumerate(zip(gates, inputs, strict=True)):
        if "logits" in gate.needs:
            tokens = replace(tokens, logits=adept.early_logits(tokens.hidden, index))
        if "draft" in gate.needs:
            if chosen is None:
                whole = adept.early_logits(tokens.hidden, index)
                draft, chosen = whole.topk(DRAFT_SIZE, dim=-1)
                before = draft
            else:
                draft = adept.draft_logits(tokens.hidden, chosen, index)
            tokens = replace(tokens, draft=draft, draft_previous=before, draft_tokens=chosen)
            before = draft
        gate(tokens)


def costs(
    adept: Any, subjects: dict[str, tuple[Sequence[Gate], list[GateInputs]]], rounds: int
) -> dict[str, float]:
    """Microseconds per token and exit point: medians of timings in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds + 1):
        for name, (gates, inputs) in subjects.items():
            _wait(inputs[0].hidden.device)
            began = time.perf_counter()
            score(adept, gates, inputs)
            _wait(inputs[0].hidden.device)
            if number:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
    counts = {name: sum(len(x.hidden) for x in inputs) for name, (_, inputs) in subjects.items()}
    return {name: statistics.median(x) / counts[name] * 1e6 for name, x in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def schedules(exits: int, length: int) -> Iterator[dict[str, Any]]:
    """Options of `Schedule` that differ on texts of this length."""
    starts = sorted({length * at // 8 for at in range(8)})
    for shallowest in range(exits):
        yield {"deepest": shallowest, "shallowest": shallowest}
        for deepest in (*range(shallowest + 1, exits), None):
            for start in starts:
                ends = {start + 1, (start + length) // 2, length, 2 * length, 4 * length}
                for end in sorted(end for end in ends if end > start):
                    yield {
                        "deepest": deepest,
                        "shallowest": shallowest,
                        "start": start,
                        "end": end,
                    }


def exits_taken(options: dict[str, Any], exits: int, length: int) -> Tensor:
    """Where a schedule lets each position leave, `[length]`; `exits` where it does not."""
    gate, place = Schedule(**options), torch.arange(length)
    empty = torch.zeros(length, 0)
    scores = [
        gate(
            GateInputs(
                hidden=empty,
                batch_index=torch.zeros_like(place),
                token_index=place,
                exit_index=index,
                phase="prefill",
                num_exits=exits,
                batch_shape=(1, length),
                position=place,
            )
        )
        for index in range(exits)
    ]
    leaves = torch.stack(scores) > _SURE
    return torch.where(leaves.any(0), leaves.int().argmax(0), exits)


def promising_schedules(agrees: Tensor, shares: Sequence[float], risk: float) -> list[Any]:
    """Those that none beats in both risk and saving, up to a risk, from little saving to much.

    Args:
        agrees: Whether tokens say at exit points what they say in the end, `[exits, n, S]`.
        shares: What leaving at each exit point saves.
        risk: The largest share of tokens that may disagree; at least one schedule is returned.
    """
    exits, _, length = agrees.shape
    wrong = torch.cat((1 - agrees.double().mean(1), torch.zeros(1, length, dtype=torch.float64)))
    gains = torch.tensor((*shares, 0.0), dtype=torch.float64)
    found = []
    for options in schedules(exits, length):
        taken = exits_taken(options, exits, length)
        saved = float(gains[taken].mean())
        if saved > 0:
            found.append((saved, float(wrong.gather(0, taken[None]).mean()), options))
    front: list[Any] = []
    for item in sorted(found, key=lambda item: (-item[0], item[1])):
        if not front or item[1] < front[-1][1]:
            front.append(item)
    front.reverse()
    good = [options for _, lost, options in front if lost <= risk] or [front[0][2]]
    step = max(-(-len(good) // _CANDIDATES), 1)
    return good[::-step][::-1]


class Comparison:
    """All criteria on one rewritten model, whose exit adapters are trained once.

    Args:
        ee: The rewritten model, with exit adapters.
        train: Ids to train adapters and gates on, `[n, S]`.
        calibration: Texts to calibrate on, `[n, S]`.
        test: Texts to measure on, `[n, S]`.
        budget: How much of everything.
        say: Told what is being done.
    """

    def __init__(
        self,
        ee: Any,
        train: Tensor,
        calibration: Tensor,
        test: Tensor,
        budget: Budget,
        say: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.ee, self.budget, self.say = ee, budget, say
        self.train, self.calibration = train, calibration.to(ee.device)
        self.test = test.to(ee.device)
        self.exits = ee.adept.config.exit_layers
        self.skipped: dict[str, str] = {}
        self._subjects: dict[str, tuple[Sequence[Gate], list[GateInputs]]] = {}
        say("exit adapters")
        self.adapter_seconds = self._fit("adapters", "agreement", budget.adapter_steps)
        say("the whole model")
        with ee.adept.disabled():
            self._full = read(ee, self.test, budget.batch)
            self._known = read(ee, self.calibration, budget.batch)

    @property
    def nll(self) -> float:
        """Of the whole model."""
        return self._full.nll

    def run(self) -> list[Row]:
        """One row per criterion and reference.

        Those with most saving come first, then those that cannot promise the target, and the
        references at the end.
        """
        self.say("references")
        references = self._references()
        self.say(SCHEDULE)
        rows = [self._schedule()]
        for criterion in CRITERIA:
            self.say(criterion.name)
            try:
                rows.append(self._criterion(criterion))
            except AdeptError as error:  # a model may have no such inputs for a gate
                self.skipped[criterion.name] = str(error)
        self.say("the cost of gates")
        cost = costs(self.ee.adept, self._subjects, self.budget.rounds)
        rows = [replace(row, cost=cost[row.name]) for row in rows]
        rows.sort(key=lambda row: (not row.promised, -row.saved))
        return rows + references

    def _fit(self, part: str, objective: str, steps: int) -> float:
        config = FitConfig(
            train=(part,),
            objective=objective,
            steps=steps,
            batch_size=self.budget.fit_batch,
            length=self.train.shape[1],
            seed=self.budget.seed,
            trainer={"disable_tqdm": True},
        )
        with redirect_stdout(io.StringIO()):  # the Trainer prints all that it logs
            return adept_fx.fit(self.ee, self.train, config).seconds

    def _criterion(self, criterion: Criterion) -> Row:
        adept, budget = self.ee.adept, self.budget
        torch.manual_seed(budget.seed)
        width = self.ee.get_input_embeddings().weight.shape[1]
        gates = [criterion.make(width).to(self.ee.device) for _ in self.exits]
        adept.set_gates(gates)
        seconds = 0.0
        if criterion.objective:
            seconds = self._fit("gates", criterion.objective, budget.gate_steps)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # no promise: the table says so
            found = adept_fx.calibrate(
                self.ee,
                self.calibration,
                target=budget.target,
                confidence=budget.confidence,
                phase="prefill",
                bound="betting",
                length=self.calibration.shape[1],
                batch_size=budget.batch,
                seed=budget.seed,
            ).phase("prefill")
        return self._row(
            criterion.name,
            gates,
            paper=criterion.paper,
            promised=found.certified,
            fit_seconds=seconds,
        )

    def _row(self, name: str, gates: Sequence[Gate], **more: Any) -> Row:
        """Measures what the gates that are set do with the test texts."""
        said = read(self.ee, self.test, self.budget.batch)
        thresholds = self.ee.adept.prefill_thresholds
        if more.get("paper"):
            some = self.test[: max(1024 // self.test.shape[1], 1)]
            self._subjects[name] = gates, inputs_of(self.ee, gates, some)
        return Row(
            name=name,
            parameters=sum(p.numel() for p in gates[0].parameters()),
            saved=said.saved,
            agreement=float((said.tokens == self._full.tokens).double().mean()),
            nll_ratio=said.nll / self._full.nll,
            thresholds=thresholds,
            saved_by_text=tuple(said.by_text.tolist()),
            **{"paper": "", **more},
        )

    def _schedule(self) -> Row:
        """The schedule that saves most and keeps the promise, or the one that loses least.

        Learn then Test, as in `adept_fx.calibrate`: some texts choose which schedules to try and in
        which order, the others test them.
        """
        budget, ee = self.budget, self.ee
        cut = max(len(self.calibration) // _SELECT, 1)
        final = self._known.tokens
        agrees = said_at_exits(ee, self.calibration[:cut], budget.batch) == final[:cut]
        shares = [1 - layers / ee.adept.num_layers for layers in self.exits]
        tried = promising_schedules(agrees, shares, 1 - budget.target)

        def losses() -> Iterator[Tensor]:
            for options in tried:
                ee.adept.set_gates(Schedule(**options))
                said = read(ee, self.calibration[cut:], budget.batch)
                yield (said.tokens != final[cut:]).double().mean(1)

        ee.adept.prefill_thresholds = _SURE
        delta = 1 - budget.confidence
        found = fixed_sequence(losses(), 1 - budget.target, delta, "betting")
        passed = sum(value <= delta for value in found)
        options = tried[max(passed - 1, 0)]
        gates = [Schedule(**options) for _ in self.exits]
        ee.adept.set_gates(gates)
        paper = "SkipDecode 2307.02628"
        return self._row(SCHEDULE, gates, paper=paper, promised=passed > 0, options=options)

    def _references(self) -> list[Row]:
        """What gates without mistakes do, and none at all."""
        agrees = said_at_exits(self.ee, self.test, self.budget.batch) == self._full.tokens
        rows = []
        for name, from_here in ((HERE, False), (FROM_HERE, True)):
            gate = perfect(agrees, self.budget.batch, from_here)
            self.ee.adept.set_gates(gate)
            self.ee.adept.prefill_thresholds = _SURE
            rows.append(self._row(name, [gate]))
        nothing = Notes((), lambda tokens: None)
        self.ee.adept.set_gates(nothing)
        self.ee.adept.prefill_thresholds = 1.0
        rows.append(self._row(NOBODY, [nothing]))
        return rows
