"""The gates that have a name: making them, and writing them to JSON."""

from __future__ import annotations

import inspect
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

import torch

from adept_fx.errors import ConfigError
from adept_fx.gates.attention_mlp import AttentionMLP
from adept_fx.gates.base import Gate, check_needs
from adept_fx.gates.cosine import Cosine
from adept_fx.gates.draft import DraftTokens
from adept_fx.gates.entropy import Entropy
from adept_fx.gates.fixed_depth import FixedDepth
from adept_fx.gates.linear import Linear
from adept_fx.gates.max_prob import MaxProb
from adept_fx.gates.mlp import MLP
from adept_fx.gates.replay import Replay
from adept_fx.gates.schedule import Schedule
from adept_fx.gates.top_gap import TopGap

if TYPE_CHECKING:
    from adept_fx.config import ExitConfig

GATES: dict[str, type[Gate]] = {
    "linear": Linear,
    "mlp": MLP,
    "attention_mlp": AttentionMLP,
    "draft": DraftTokens,
    "max_prob": MaxProb,
    "top_gap": TopGap,
    "entropy": Entropy,
    "cosine": Cosine,
    "fixed_depth": FixedDepth,
    "schedule": Schedule,
}
"""Names that `ExitConfig.gate` knows. `Replay` has none: it needs tensors."""


def gate_class(name: object) -> type[Gate]:
    """Returns the class of a gate's name; raises `ConfigError` if there is none."""
    if not isinstance(name, str) or name not in GATES:
        raise ConfigError(f"unknown gate {short(name)}", hint=f"known gates: {', '.join(GATES)}")
    return GATES[name]


def check_gates(value: Any) -> str | Gate | tuple[str | Gate, ...]:
    """Returns a value for `ExitConfig.gate`, a list as a tuple.

    Raises:
        ConfigError: If it is, or holds, anything but known names and `Gate` instances.
    """
    if isinstance(value, (tuple, list)):
        return tuple(_check_gate(item) for item in value)
    return _check_gate(value)


def _check_gate(value: Any) -> str | Gate:
    if not isinstance(value, (str, Gate)):
        raise ConfigError(
            f"gate must be a name, a Gate instance, or one per exit; {short(value)} is neither",
            hint=f"known gates: {', '.join(GATES)}",
        )
    if isinstance(value, str):
        gate_class(value)
    return value


def build_gates(
    config: ExitConfig,
    hidden_size: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> list[Gate]:
    """Returns the gate of each exit point: fresh for a name, an instance as it is.

    Gates that depend on more of the model than this get their sizes later: `Gate.set_sizes`.

    Args:
        config: A configuration with explicit exits (`ExitConfig.resolve`).
        hidden_size: Width of the model's residual stream.
        device: Where fresh gates live.
        dtype: Dtype of fresh gates.

    Returns:
        One gate per exit, in order.

    Raises:
        ConfigError: If the exits are not explicit, or a gate does not fit the model.
    """
    gates = []
    for gate in config.gates:
        if isinstance(gate, str):
            kind = gate_class(gate)
            options = {"hidden_size": hidden_size, "device": device, "dtype": dtype}
            asked = inspect.signature(kind).parameters
            gate = kind(**{name: value for name, value in options.items() if name in asked})
        gates.append(_fitting(gate, hidden_size))
    return gates


def _fitting(gate: Gate, hidden_size: int) -> Gate:
    """Returns the gate after checking that it can serve this model."""
    check_needs(gate.needs, type(gate).__name__)  # An instance may have set its own.
    if isinstance(gate, (Linear, MLP, AttentionMLP)) and gate.hidden_size != hidden_size:
        raise ConfigError(
            f"gate {type(gate).__name__} was made for hidden size {gate.hidden_size}; the model "
            f"has {hidden_size}",
            hint=f"make it with hidden_size={hidden_size}, or give its name",
        )
    return gate


def gates_to_json(gate: str | Gate | tuple[str | Gate, ...]) -> Any:
    """Returns the value of `ExitConfig.gate` as JSON types; raises `ConfigError` if it cannot.

    An instance becomes its name and options (not its weights); where it comes up again in a tuple,
    `{"same_as": i}` points to the first exit that has it.
    """
    if not isinstance(gate, tuple):
        return gate if isinstance(gate, str) else _to_json(gate)
    first: dict[Gate, int] = {}
    items: list[Any] = []
    for index, item in enumerate(gate):
        if isinstance(item, str):
            items.append(item)
        elif item in first:
            items.append({"same_as": first[item]})
        else:
            first[item] = index
            items.append(_to_json(item))
    return items


def _to_json(gate: Gate) -> dict[str, Any]:
    """Returns one gate as its name and the options that make it."""
    for name, kind in GATES.items():
        # Exactly this class: a subclass would come back as its parent.
        if type(gate) is kind:
            return {"name": name} | {option: getattr(gate, option) for option in _options(kind)}
    why = "it holds tensors" if isinstance(gate, Replay) else "it is not a shipped gate"
    raise ConfigError(
        f"gate {type(gate).__name__} cannot be written to JSON: {why}",
        hint="write the config with a named gate and set your own with "
        "dataclasses.replace(config, gate=...) after reading it",
    )


def gates_from_json(value: Any) -> Any:
    """Reads what `gates_to_json` wrote; raises `ConfigError` if an object is no gate.

    What is no object passes through: `ExitConfig` judges it.
    """
    if isinstance(value, dict):
        return _from_json(value)
    if not isinstance(value, list):
        return value
    gates: list[Any] = []
    for item in value:
        if isinstance(item, dict):
            gates.append(_same(item, gates) if "same_as" in item else _from_json(item))
        else:
            gates.append(item)
    return tuple(gates)


def _same(item: dict[str, Any], gates: list[Any]) -> Gate:
    """Returns the earlier instance that a `{"same_as": i}` points to."""
    index = item["same_as"]
    known = isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(gates)
    if len(item) != 1 or not known or not isinstance(gates[index], Gate):
        raise ConfigError(f"{item!r} must point to an earlier gate that is an object")
    gate: Gate = gates[index]
    return gate


def _from_json(item: dict[str, Any]) -> Gate:
    """Makes a gate from its name and options."""
    options = dict(item)
    kind = gate_class(options.pop("name", None))
    known = _options(kind)
    wrong = sorted(options.keys() - set(known))
    missing = [name for name, required in known.items() if required and name not in options]
    if wrong or missing:
        raise ConfigError(
            f"gate {item['name']!r}: unknown options {wrong}, missing options {missing}",
            hint=f"its options: {', '.join(known) or 'none'}",
        )
    return kind(**options)


def _options(kind: type[Gate]) -> dict[str, bool]:
    """Returns the options of a gate that JSON keeps, and whether each is required."""
    if kind.__init__ is Gate.__init__:  # That of nn.Module, which takes *args and **kwargs.
        return {}
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default is p.empty for p in parameters if p.name not in ("device", "dtype")}
