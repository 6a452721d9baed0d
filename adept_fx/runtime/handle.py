"""``ee.adept``: the handle of a transformed model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from adept_fx.config import ExitConfig
from adept_fx.errors import ConfigError, InputError, UnsupportedModelError
from adept_fx.gates.base import Gate
from adept_fx.gates.registry import build_gates
from adept_fx.graph.kv_projections import KVProjection
from adept_fx.graph.runner import PassRecord
from adept_fx.low_rank import KVMaps
from adept_fx.model_facts import hidden_size
from adept_fx.pipeline import Program
from adept_fx.runtime.decoder import ExitAwareForward
from adept_fx.runtime.equip import asks_program, equip
from adept_fx.runtime.gate_inputs import wanted
from adept_fx.runtime.head import Head
from adept_fx.runtime.plan import PLANS
from adept_fx.runtime.run import Run, Settings
from adept_fx.runtime.stats import Stats
from adept_fx.runtime.watch import Observer

if TYPE_CHECKING:
    from adept_fx.report.explanation import Explanation


class Adept(nn.Module):
    """Settings, gates and statistics of a transformed model.

    Its parameters are the exits' own; in the model's ``state_dict`` they are named ``adept.*``.
    Thresholds, plan and gates may change at any time.

    Attributes:
        config: The resolved :class:`~adept_fx.ExitConfig`.
        gates: One per exit point.
        adapters: The exit adapters, one per exit point; empty if the config has none.
        kv_maps: The learned KV maps; None if the config has none.
        stats: Counts over all forwards, see :class:`~adept_fx.runtime.stats.Stats`.
        last_depth: ``[B, S]`` int64, layers run per token in the last forward: the number of
            layers if none was skipped, 0 for padding; None before the first forward.
        calibration: What :func:`adept_fx.calibrate` found, as JSON types: per phase, the promise
            that the thresholds keep. None if it has not been called.
        online: What moves the thresholds while the model runs, see
            :class:`~adept_fx.calibration.online.BetaMixture`; None switches it off.
    """

    def __init__(
        self,
        config: ExitConfig,
        gates: Sequence[Gate],
        *,
        adapters: Sequence[nn.Module] = (),
        kv_maps: KVMaps | None = None,
        one_threshold: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self._one_threshold = one_threshold  # for both phases
        self.gates = nn.ModuleList(gates)
        self.adapters = nn.ModuleList(adapters)
        self.kv_maps = kv_maps
        self.stats = Stats(config.exit_layers)
        self.last_depth: Tensor | None = None
        self.calibration: dict[str, Any] | None = None
        self.online: Observer | None = None
        self._thresholds = config.thresholds
        self._prefill_thresholds = config.prefill_thresholds
        self._plan = "auto"
        self._disabled = 0
        # In a tuple: modules of the model must not become children of the handle.
        self._links: tuple[ExitAwareForward, Head] | None = None
        self.register_load_state_dict_pre_hook(_fill_missing)  # type: ignore[no-untyped-call]

    def link(self, forward: ExitAwareForward, head: Head) -> None:
        """Connects the handle with its decoder and head; called by ``transform``."""
        self._links = (forward, head)

    @property
    def _forward(self) -> ExitAwareForward:
        if self._links is None:
            raise InputError("this handle belongs to no model")
        return self._links[0]

    @property
    def _head(self) -> Head:
        if self._links is None:
            raise InputError("this handle belongs to no model")
        return self._links[1]

    @property
    def decoder(self) -> nn.Module:
        """The exit-aware decoder."""
        return self._forward.decoder

    def _program(self) -> Program:
        return self._forward.current()

    @property
    def graph(self) -> fx.GraphModule:
        """The exit-aware graph; ``print(ee.adept.graph.code)`` shows the pipeline."""
        return self._program().graph

    @property
    def num_layers(self) -> int:
        """Number of layers of the model."""
        return self._program().num_layers

    @property
    def container(self) -> str:
        """Where the decoder keeps its layers, ``"layers"`` for example; empty if nowhere alone."""
        return self._program().container

    @property
    def compiled(self) -> bool:
        """Whether :meth:`compile` was called."""
        return self._forward.compiled

    @property
    def records(self) -> tuple[PassRecord, ...]:
        """What each pass did and how long it took."""
        return self._program().records

    @property
    def kv_projections(self) -> tuple[KVProjection, ...]:
        """How keys and values of skipped layers are projected: see ``KVProjection.form``."""
        return self._program().kv_projections

    @property
    def thresholds(self) -> tuple[float, ...]:
        """One per exit point; a token leaves iff its score is greater. 1.0 means never.

        Setting takes a float or one per exit, for both phases, unless the config has a
        ``prefill_threshold``: then only for decoding (see :attr:`prefill_thresholds`).
        """
        return self._thresholds

    @thresholds.setter
    def thresholds(self, value: float | Sequence[float] | Tensor) -> None:
        self._thresholds = self._checked(value)
        if self._one_threshold:
            self._prefill_thresholds = self._thresholds

    @property
    def prefill_thresholds(self) -> tuple[float, ...]:
        """The thresholds of calls with more than one new token per row."""
        return self._prefill_thresholds

    @prefill_thresholds.setter
    def prefill_thresholds(self, value: float | Sequence[float] | Tensor) -> None:
        self._prefill_thresholds = self._checked(value)

    def _checked(self, value: float | Sequence[float] | Tensor) -> tuple[float, ...]:
        plain: Any = value.tolist() if isinstance(value, Tensor) else value
        count = len(self.config.exit_layers)
        numbers = tuple(plain) if isinstance(plain, (list, tuple)) else (plain,) * count
        return ExitConfig(exits=self.config.exit_layers, threshold=numbers).thresholds

    @property
    def plan(self) -> str:
        """``"auto"`` takes the cheapest plan, ``"dense"`` and ``"compact"`` force one."""
        return self._plan

    @plan.setter
    def plan(self, value: str) -> None:
        if value not in PLANS:
            raise ConfigError(f"unknown plan {value!r}; known: {', '.join(PLANS)}")
        self._plan = value

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switches all exits off inside the context: the rewritten graph runs without gates."""
        self._disabled += 1
        try:
            yield
        finally:
            self._disabled -= 1

    @property
    def exits_are_off(self) -> bool:
        """Whether we are inside of :meth:`disabled`."""
        return self._disabled > 0

    def compile(self, mode: str | None = None, **options: Any) -> None:
        """Compiles the graph in place: ``generate()`` and every other call use it.

        Each stage, the KV synthesis and the final norm become one ``torch.compile`` region with
        dynamic sizes; equal stages share theirs. Gates that are computed token by token
        (``Gate.per_token``) run with the stage before them, the others between the stages. Key and
        value weights of skipped layers become views of one buffer per kind, so that they are
        projected in one batched product where that is faster; their memory does not grow. A change
        to the model raises ``StaleGraphError``.

        Args:
            mode: As in ``torch.compile``.
            options: More arguments for ``torch.compile``, e.g. ``backend``.
        """
        self._forward.compile(mode, options)

    def uncompile(self) -> None:
        """Undoes :meth:`compile`."""
        self._forward.uncompile()

    def set_gates(self, gates: Gate | Sequence[Gate]) -> None:
        """Replaces the gates: one for all exits, or one per exit.

        Gates that ask for more of the graph (``Gate.needs``) make the next call capture again.

        Raises:
            ConfigError: They do not fit the model.
            UnsupportedModelError: The model cannot give a gate what it asks for.
        """
        count = len(self.config.exit_layers)
        chosen = [gates] * count if isinstance(gates, Gate) else list(gates)
        if len(chosen) != count or not all(isinstance(gate, Gate) for gate in chosen):
            raise ConfigError(f"{count} gates are needed, one per exit point")
        config = replace(self.config, gate=tuple(chosen))
        build_gates(config, hidden_size(self.decoder))  # raises if one does not fit
        before = self.gate_list()
        self._put(chosen)
        if any(asks_program(gate) for gate in chosen):
            try:
                equip(chosen, self._program(), self._head)
            except BaseException:
                self._put(before)
                raise

    def _put(self, gates: Sequence[Gate]) -> None:
        """Puts gates in place of those that are there."""
        before = [wanted(gate.needs) for gate in self.gate_list()]
        self.gates = nn.ModuleList(gates)
        if before != [wanted(gate.needs) for gate in gates]:
            self._forward.forget()

    def gate_list(self) -> list[Gate]:
        """The gates, one per exit point."""
        return [gate for gate in self.gates if isinstance(gate, Gate)]

    def settings(self, program: Program, tokens: int) -> Settings:
        """What a call with ``tokens`` new tokens per row runs with."""
        thresholds = self._prefill_thresholds if tokens > 1 else self._thresholds
        settings = Settings(
            exits=self.config.exit_layers,
            gates=() if self._disabled else tuple(self.gate_list()),
            thresholds=thresholds,
            # Gradients flow through the masked-dense plan.
            plan="dense" if self.training and torch.is_grad_enabled() else self._plan,
            num_layers=program.num_layers,
            logits=partial(self.early_logits, program=program),
            draft=partial(self.draft_logits, program=program),
            adapters=tuple(self.adapters),
            compiled=self._forward.compiled,
            costs=self._forward.costs,
            by_row=self.config.leave == "rows",
        )
        if self.online is None or self._disabled or self.training:
            return settings
        return self.online.enter(settings, tokens)

    def early_logits(
        self, hidden: Tensor, exit_index: int, program: Program | None = None
    ) -> Tensor:
        """What tokens would emit if they left: exit adapter, final norm and head.

        Args:
            hidden: Their states at the exit point, ``[N, D]``.
            exit_index: Which exit point that is, counted from 0.
            program: The program whose final norm is meant; the one used last by default.

        Returns:
            ``[N, V]``.
        """
        return self._head(*self._leaving(hidden, exit_index, program))

    def draft_logits(
        self, hidden: Tensor, chosen: Tensor, exit_index: int, program: Program | None = None
    ) -> Tensor:
        """Of :meth:`early_logits` some entries per token, without computing the others.

        Args:
            hidden: The tokens' states at the exit point, ``[N, D]``.
            chosen: Entries of the vocabulary, ``[N, k]``.
            exit_index: Which exit point that is, counted from 0.
            program: The program whose final norm is meant; the one used last by default.

        Returns:
            ``[N, k]``.
        """
        return self._head.rows(*self._leaving(hidden, exit_index, program), chosen)

    def _leaving(
        self, hidden: Tensor, exit_index: int, program: Program | None
    ) -> tuple[Any, Tensor, type]:
        """What the head needs of tokens that leave: final norm, adapted states, output class."""
        program = program or self._program()
        state = self.adapters[exit_index](hidden) if self.adapters else hidden
        return program.graph.epilogue, state, program.output_type

    def final_logits(self, states: Tensor) -> Tensor:
        """What the head makes of the decoder's output: ``[N, D]`` to ``[N, V]``."""
        return self._head(_unchanged, states, self._program().output_type)

    @property
    def pools(self) -> bool:
        """Whether the model's head gives one result per row: it is a sequence classifier."""
        return self._forward.pooling is not None

    def pooled_tokens(self, **arguments: Tensor) -> Tensor:
        """Which tokens such a result is made of, ``[B, S]`` bool.

        Args:
            arguments: Of a call of the model, ``input_ids [B, S]`` among them.

        Raises:
            InputError: The head gives no result per row, or cannot be followed.
        """
        pooling = self._forward.pooling
        found = pooling.tokens_of(arguments) if pooling is not None else None
        if found is None:
            raise InputError("the model's head gives no result per row for these arguments")
        return found

    def record(self, run: Run, hidden: Tensor) -> None:
        """Keeps the statistics of a finished forward with final states ``hidden [B, S, D]``."""
        total = run.real_count * run.settings.num_layers
        needed = int(run.depth.sum())
        self.stats.add(run.phase, run.seen, run.exited, run.executed, needed, total)
        self.last_depth = run.depth
        if self.online is not None:
            self.online.leave(self, run, hidden)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The handle is no layer.

        Raises:
            UnsupportedModelError: Always.
        """
        raise UnsupportedModelError("ee.adept is a handle; call the model itself")

    def explain(self) -> "Explanation":
        """What the model was rewritten into: see :func:`adept_fx.explain`."""
        return self._explanation(self._program())

    def _explanation(self, program: Program) -> "Explanation":
        from adept_fx.report.describe import describe  # Here: reports know the runtime.

        model = self._links[1].model if self._links else self.decoder
        exits, gates = self.config.exit_layers, self.gate_list()
        return describe(program, model, self.decoder, exits, gates)

    def __repr__(self) -> str:
        """A summary of the model, its exits and its settings, of at most 40 lines."""
        from adept_fx.report import text, words

        runs = self._settings_in_words()
        program = self._forward.used if self._links else None
        if program is None:
            return text.plain([("exits", words.ranges(self.config.exit_layers)), *runs])
        return text.plain(text.rows(self._explanation(program), runs))

    def _settings_in_words(self) -> list[tuple[str, str]]:
        def short(values: Sequence[float]) -> str:
            return ", ".join(map(str, values if len(set(values)) > 1 else values[:1]))

        thresholds = short(self._thresholds)
        if self._prefill_thresholds != self._thresholds:
            thresholds += f"; in prefill {short(self._prefill_thresholds)}"
        off = ", exits off for now" if self._disabled else ""
        return [("thresholds", thresholds), ("plan", f"{self._plan}, kv {self.config.kv}{off}")]


def _unchanged(states: Tensor) -> Tensor:
    return states


def handle(ee: nn.Module) -> Adept:
    """The handle of a transformed model.

    Raises:
        UnsupportedModelError: ``ee`` was not transformed.
    """
    adept = getattr(ee, "adept", None)
    if not isinstance(adept, Adept):
        raise UnsupportedModelError("this model was not made by adept_fx.transform")
    return adept


def _fill_missing(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets a state dict without any ``adept.`` key load: the exits keep what they have."""
    if not any(key.startswith(prefix) for key in state):
        state.update({prefix + key: value for key, value in module.state_dict().items()})
