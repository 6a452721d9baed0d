"""`ExitConfig`: where tokens may leave, and what decides it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from adept_fx.errors import ConfigError

if TYPE_CHECKING:
    from adept_fx.gates import Gate

KV_POLICIES = ("synthesize", "map", "map_per_layer")
"""Known values of `ExitConfig.kv`."""

LEAVING = ("tokens", "rows")
"""Known values of `ExitConfig.leave`."""

_EVERY = re.compile(r"every:([1-9][0-9]{0,8})")


@dataclass(frozen=True)
class ExitConfig:
    """Where tokens may leave a decoder, and what decides it.

    Lists are accepted wherever tuples are. Where a value may be one per exit, a single one serves
    all exits; a single gate *instance* is shared by them, a gate's *name* makes a fresh gate each.
    Whatever is invalid raises `ConfigError`.

    Attributes:
        exits: Exit points, strictly increasing: `e` lies after `e` layers have run. Or `"every:N"`:
            after every N layers.
        gate: A gate's name, a `Gate`, or one per exit.
        threshold: A token leaves iff its score is strictly above this number in [0, 1], so 1.0
            means never. One number, or one per exit.
        prefill_threshold: The same for calls with more than one new token per row; None means
            `threshold`. So the verification step of assisted generation counts as prefill, and a
            last chunk of one token as decode.
        kv: How the keys and values of skipped layers come about: each layer projects the state that
            a token left with (``"synthesize"``), or a learned map of it, one per exit (``"map"``)
            or one per exit and layer (``"map_per_layer"``).
        kv_rank: Rank of those maps.
        adapter_rank: Rank of the learned exit adapters, between an exit and the final norm; 0 for
            none.
        leave: Who leaves. ``"tokens"``: each for itself. ``"rows"``, of sequence classifiers alone:
            gates are asked only about the tokens that a row's result is made of, and all others
            stay until their row is done. That is what gates and adapters are trained for, and costs
            less where a row has many tokens. In a call that wants a whole cache nothing leaves.
    """

    exits: tuple[int, ...] | str = "every:4"
    gate: str | Gate | tuple[str | Gate, ...] = "mlp"
    threshold: float | tuple[float, ...] = 1.0
    prefill_threshold: float | tuple[float, ...] | None = None
    kv: str = "synthesize"
    kv_rank: int = 16
    adapter_rank: int = 0
    leave: str = "tokens"

    def __post_init__(self) -> None:
        """Brings the values to their normal form and checks all that needs no model."""
        from adept_fx.gates.registry import check_gates  # Here, because it imports torch.

        set_field = partial(object.__setattr__, self)  # The way of a frozen dataclass.
        set_field("exits", _check_exits(self.exits))
        set_field("gate", check_gates(self.gate))
        set_field("threshold", _check_thresholds("threshold", self.threshold))
        if self.prefill_threshold is not None:
            prefill = _check_thresholds("prefill_threshold", self.prefill_threshold)
            set_field("prefill_threshold", prefill)
        if not isinstance(self.kv, str) or self.kv not in KV_POLICIES:
            known = ", ".join(KV_POLICIES)
            raise ConfigError(f"unknown kv policy {short(self.kv)}", hint=f"known: {known}")
        if not isinstance(self.leave, str) or self.leave not in LEAVING:
            known = ", ".join(LEAVING)
            raise ConfigError(f"leave={short(self.leave)} is unknown", hint=f"known: {known}")
        _check_rank("kv_rank", self.kv_rank, least=1)
        _check_rank("adapter_rank", self.adapter_rank, least=0)
        self._check_counts()

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """The exit points; raises `ConfigError` while they still depend on the model."""
        if isinstance(self.exits, str):
            raise ConfigError(
                f"exits={self.exits!r} depends on the model's number of layers",
                hint="call config.resolve(num_layers) first",
            )
        return self.exits

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The decode threshold of each exit; needs explicit exits."""
        value = self.threshold
        return value if isinstance(value, tuple) else (value,) * len(self.exit_layers)

    @property
    def prefill_thresholds(self) -> tuple[float, ...]:
        """The prefill threshold of each exit; needs explicit exits."""
        value = self.threshold if self.prefill_threshold is None else self.prefill_threshold
        return value if isinstance(value, tuple) else (value,) * len(self.exit_layers)

    @property
    def gates(self) -> tuple[str | Gate, ...]:
        """The gate, or gate name, of each exit; needs explicit exits."""
        return self.gate if isinstance(self.gate, tuple) else (self.gate,) * len(self.exit_layers)

    def resolve(self, num_layers: int) -> ExitConfig:
        """Fits the configuration to a model.

        Args:
            num_layers: Number of layers `L` of the model.

        Returns:
            The same with explicit exits, and gates and thresholds as tuples of one per exit.

        Raises:
            ConfigError: If there is no exit point, one is not below `L`, or the numbers differ.
        """
        if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
            raise ConfigError(f"num_layers must be an int of at least 1, not {short(num_layers)}")
        config = replace(self, exits=self._explicit(num_layers))
        decode, prefill = config.thresholds, config.prefill_thresholds
        return replace(config, gate=config.gates, threshold=decode, prefill_threshold=prefill)

    def to_json(self) -> str:
        """Returns the configuration as JSON text; raises `ConfigError` for a gate of your own.

        An instance of a shipped gate becomes its name and options; weights are not part of it.
        """
        from adept_fx.gates.registry import gates_to_json

        return json.dumps(vars(self) | {"gate": gates_to_json(self.gate)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> ExitConfig:
        """Reads what `to_json` wrote, raising `ConfigError` for anything else.

        A value that is left out has its default.
        """
        from adept_fx.gates.registry import gates_from_json

        try:
            values = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"this is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"an ExitConfig is a JSON object, not {short(values)}")
        known = [field.name for field in fields(cls)]
        unknown = sorted(values.keys() - set(known))
        if unknown:
            raise ConfigError(f"unknown keys {unknown}", hint=f"known keys: {', '.join(known)}")
        if "gate" in values:
            values["gate"] = gates_from_json(values["gate"])
        return cls(**values)

    def _explicit(self, num_layers: int) -> tuple[int, ...]:
        """Returns the exit points in a model of `num_layers` layers."""
        if isinstance(self.exits, str):
            step = int(self.exits.removeprefix("every:"))
            exits, wrong = tuple(range(step, num_layers, step)), step
        else:
            exits = self.exits
            wrong = next((e for e in exits if e >= num_layers), 0)
        if not exits or wrong >= num_layers:
            raise ConfigError(
                f"exits={short(self.exits)} does not fit a model of {num_layers} layers: "
                f"{wrong} is not in 1..{num_layers - 1}",
                hint="an exit point e lies after e layers; the last layer is no exit point",
            )
        return exits

    def _check_counts(self) -> None:
        """Checks that all that is given per exit agrees in number."""
        per_exit = {name: value for name, value in vars(self).items() if isinstance(value, tuple)}
        counts = {name: len(value) for name, value in per_exit.items()}
        if len(set(counts.values())) > 1 or 0 in counts.values():
            found = ", ".join(f"{count} in {name}" for name, count in counts.items())
            raise ConfigError(
                f"values per exit do not agree in number for exits={short(self.exits)}: {found}",
                hint="give one value per exit, or a single value for all",
            )


def _check_thresholds(name: str, value: Any) -> float | tuple[float, ...]:
    if isinstance(value, (tuple, list)):
        return tuple(_check_threshold(f"{name}[{i}]", item) for i, item in enumerate(value))
    return _check_threshold(name, value)


def _check_threshold(name: str, value: Any) -> float:
    # The chained comparison is false for NaN, and exact for ints that no float can hold.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise ConfigError(
            f"{name} must be a number in [0, 1], not {short(value)}",
            hint="a token leaves iff its score is above the threshold; 1.0 means never",
        )
    return float(value)


def _check_rank(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, not {short(value)}")


def _check_exits(value: Any) -> tuple[int, ...] | str:
    if isinstance(value, str):
        if not _EVERY.fullmatch(value):
            raise ConfigError(
                f"exits={short(value)} is not understood",
                hint='"every:N" with a whole N >= 1, or a tuple of layer numbers',
            )
        return value
    if not isinstance(value, (tuple, list)) or not value:
        raise ConfigError(f'exits must be a tuple of ints, or "every:N", not {short(value)}')
    for before, item in pairwise((0, *value)):
        if isinstance(item, bool) or not isinstance(item, int) or item <= before:
            why = "exits must be ints of at least 1, strictly increasing"
            raise ConfigError(f"{why}; {short(item)} breaks that")
    return tuple(value)
