"""`ExitConfig`: validation, resolution against a model, JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adept_fx import config as config_module
from adept_fx.config import ExitConfig
from adept_fx.errors import ConfigError
from adept_fx.gates import MLP, FixedDepth, Gate, Linear, MaxProb, Replay
from adept_fx.gates.registry import GATES

deterministic = settings(deadline=None, derandomize=True, max_examples=60)


class OwnGate(Gate):
    """A gate that no registry knows."""


class OwnMLP(MLP):
    """A subclass of a shipped gate."""


def test_defaults() -> None:
    config = ExitConfig()
    assert config.exits == "every:4"
    assert config.gate == "mlp"
    assert config.threshold == 1.0
    assert config.prefill_threshold is None
    assert config.kv == "synthesize"


def test_is_frozen_and_hashable() -> None:
    config = ExitConfig(exits=(1, 2), gate=("mlp", "linear"), threshold=(0.5, 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.threshold = 0.5  # type: ignore[misc]
    assert hash(config) == hash(ExitConfig((1, 2), ("mlp", "linear"), (0.5, 1.0)))


def test_lists_become_tuples_and_ints_floats() -> None:
    config = ExitConfig([1, 3], ["mlp", "cosine"], [0, 1], [0.5, 1])  # type: ignore[arg-type]
    assert config == ExitConfig((1, 3), ("mlp", "cosine"), (0.0, 1.0), (0.5, 1.0))
    assert all(type(value) is float for value in (*config.thresholds, *config.prefill_thresholds))


BAD_EXITS: list[object] = [
    *((), [], {}, {1: 2}, {1, 2}, range(1, 3), None, 4, 4.0, True),
    *((0,), (-1,), (2, 2), (3, 1), (1.0,), (True,), ("1",), (1, None), (1, False)),
    *("", "every", "every:", "every:0", "every:-1", "every:1.5", "every: 4", "every:4 ", "4"),
    *("every:4\n", "Every:4", "every:04", "every:٤", "every:" + "9" * 5000),
]


@pytest.mark.parametrize("exits", BAD_EXITS, ids=lambda value: repr(value)[:20])
def test_bad_exits_are_refused(exits: object) -> None:
    with pytest.raises(ConfigError, match="exits"):
        ExitConfig(exits=exits)  # type: ignore[arg-type]


BAD_THRESHOLDS: list[object] = [
    *(True, "0.5", {}, {0.5}, torch.tensor(0.5), 1j, [True], [None], [[0.5]], []),
    *(-0.1, 1.1, -1, 2, math.nan, math.inf, -math.inf, 10**400, [0.5, math.nan]),
    math.nextafter(1.0, 2.0),
]


@pytest.mark.parametrize("field", ["threshold", "prefill_threshold"])
@pytest.mark.parametrize("value", BAD_THRESHOLDS, ids=lambda value: repr(value)[:20])
def test_bad_thresholds_are_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        ExitConfig(**{field: value})  # type: ignore[arg-type]


def test_none_means_threshold_only_for_prefill() -> None:
    with pytest.raises(ConfigError, match="threshold"):
        ExitConfig(threshold=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("gate", ["", "MLP", "replay", "nope", ["mlp", "nope"]])
def test_unknown_gate_names_list_the_known_ones(gate: object) -> None:
    with pytest.raises(ConfigError, match="unknown gate") as caught:
        ExitConfig(gate=gate)  # type: ignore[arg-type]
    assert all(name in str(caught.value) for name in GATES)


@pytest.mark.parametrize("gate", [None, 1, MLP, {}, torch.nn.Linear(2, 1), [["mlp"]], []])
def test_what_is_no_gate_is_refused(gate: object) -> None:
    with pytest.raises(ConfigError, match="gate"):
        ExitConfig(gate=gate)  # type: ignore[arg-type]


@pytest.mark.parametrize("kv", ["", "exact", None, 1, ["synthesize"]])
def test_unknown_kv_policies_list_the_known_ones(kv: object) -> None:
    with pytest.raises(ConfigError, match="synthesize"):
        ExitConfig(kv=kv)  # type: ignore[arg-type]


PER_EXIT = [
    {"threshold": (0.5,)},
    {"prefill_threshold": (0.5, 0.5, 0.5)},
    {"gate": ("mlp",)},
    {"gate": ("mlp",) * 3, "threshold": (0.5, 0.5)},
]


@pytest.mark.parametrize("values", PER_EXIT)
def test_counts_must_agree_with_explicit_exits(values: dict) -> None:
    with pytest.raises(ConfigError, match="2 in exits"):
        ExitConfig(exits=(1, 2), **values)


def test_counts_must_agree_among_each_other_before_the_exits_are_known() -> None:
    with pytest.raises(ConfigError, match=r"2 in gate, 3 in threshold"):
        ExitConfig(gate=("mlp", "mlp"), threshold=(0.1, 0.2, 0.3))


@deterministic
@given(st.integers(1, 12), st.integers(1, 40))
def test_every_n_resolves_to_the_multiples_below_l(step: int, num_layers: int) -> None:
    config = ExitConfig(exits=f"every:{step}")
    expected = tuple(e for e in range(1, num_layers) if e % step == 0)
    if expected:
        assert config.resolve(num_layers).exits == expected
    else:
        with pytest.raises(ConfigError, match=rf"every:{step}.*{num_layers} layers"):
            config.resolve(num_layers)


@deterministic
@given(st.sets(st.integers(1, 20), min_size=1), st.integers(1, 20))
def test_explicit_exits_must_lie_below_l(exits: set[int], num_layers: int) -> None:
    config = ExitConfig(exits=tuple(sorted(exits)))
    if max(exits) < num_layers:
        assert config.resolve(num_layers).exits == tuple(sorted(exits))
    else:
        offending = min(e for e in exits if e >= num_layers)
        with pytest.raises(ConfigError, match=rf"{num_layers} layers: {offending} is not"):
            config.resolve(num_layers)


def test_resolve_spreads_single_values_and_is_idempotent() -> None:
    gate = FixedDepth()
    resolved = ExitConfig("every:2", gate, 0.5).resolve(6)
    assert resolved == ExitConfig((2, 4), (gate, gate), (0.5, 0.5), (0.5, 0.5))
    assert resolved.gates[0] is gate
    assert resolved.resolve(6) == resolved


def test_resolve_keeps_what_is_given_per_exit() -> None:
    resolved = ExitConfig("every:2", ("mlp", "cosine"), (0.1, 0.2), 0.9).resolve(6)
    assert resolved == ExitConfig((2, 4), ("mlp", "cosine"), (0.1, 0.2), (0.9, 0.9))


def test_prefill_thresholds_default_to_those_of_decode() -> None:
    assert ExitConfig((1, 2), threshold=(0.1, 0.2)).prefill_thresholds == (0.1, 0.2)


def test_resolve_checks_the_counts_of_every_n() -> None:
    with pytest.raises(ConfigError, match="3 in exits, 2 in threshold"):
        ExitConfig("every:2", threshold=(0.1, 0.2)).resolve(8)


@pytest.mark.parametrize("num_layers", [0, -1, True, 4.0, "4", None])
def test_resolve_refuses_what_is_no_number_of_layers(num_layers: object) -> None:
    with pytest.raises(ConfigError, match="num_layers"):
        ExitConfig().resolve(num_layers)  # type: ignore[arg-type]


def test_helpers_need_explicit_exits() -> None:
    for name in ("exit_layers", "thresholds", "prefill_thresholds", "gates"):
        with pytest.raises(ConfigError, match="resolve"):
            getattr(ExitConfig(), name)


thresholds = st.floats(0, 1) | st.integers(0, 1)


@st.composite
def configs(draw: st.DrawFn) -> ExitConfig:
    count = draw(st.integers(1, 4))

    def one_or_each(item: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return item | st.lists(item, min_size=count, max_size=count)

    return ExitConfig(
        "every:3" if draw(st.booleans()) else tuple(range(1, count + 1)),
        draw(one_or_each(st.sampled_from(sorted(GATES)))),
        draw(one_or_each(thresholds)),
        draw(st.none() | one_or_each(thresholds)),
    )


@deterministic
@given(configs())
def test_json_round_trip_is_exact(config: ExitConfig) -> None:
    assert ExitConfig.from_json(config.to_json()) == config


def test_json_writes_shipped_instances_with_their_options() -> None:
    gates = (MLP(8, width=3, bias_init=-2.0), Linear(8), MaxProb(), FixedDepth(2))
    config = ExitConfig((1, 2, 3, 4), gates)
    assert json.loads(config.to_json())["gate"] == [
        {"name": "mlp", "hidden_size": 8, "width": 3, "bias_init": -2.0},
        {"name": "linear", "hidden_size": 8, "bias_init": -6.0},
        {"name": "max_prob"},
        {"name": "fixed_depth", "exit_index": 2},
    ]
    again = ExitConfig.from_json(config.to_json())
    assert again.to_json() == config.to_json()
    assert [type(gate) for gate in again.gates] == [type(gate) for gate in gates]


def test_json_keeps_which_exits_share_an_instance() -> None:
    shared, other = Linear(4), Linear(4)
    config = ExitConfig((1, 2, 3, 4), (shared, other, "linear", shared))
    first, second, third, fourth = ExitConfig.from_json(config.to_json()).gates
    assert first is fourth
    assert first is not second
    assert third == "linear"


def test_json_of_a_single_instance_stays_single() -> None:
    again = ExitConfig.from_json(ExitConfig(gate=FixedDepth(1)).to_json())
    assert isinstance(again.gate, FixedDepth)
    assert again.gate.exit_index == 1


@pytest.mark.parametrize(
    ("gate", "why"),
    [(OwnGate(), "not a shipped"), (OwnMLP(4), "not a shipped"), (Replay([]), "holds tensors")],
)
def test_json_refuses_other_gates_and_says_why(gate: Gate, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        ExitConfig((1, 2), gate=("mlp", gate)).to_json()


def test_json_values_left_out_have_their_defaults() -> None:
    assert ExitConfig.from_json('{"exits": [2], "threshold": 0.5}') == ExitConfig((2,), "mlp", 0.5)


BAD_JSON = [
    *("", "nope", "[]", "3", "null", '"every:4"', "{", None, "[" * 100_000),
    *('{"exit": [1]}', '{"exits": null}', '{"exits": {}}', '{"exits": [true]}'),
    *('{"threshold": NaN}', '{"threshold": 1e400}', '{"threshold": null}', '{"kv": "x"}'),
    *('{"gate": null}', '{"gate": 3}', '{"gate": {}}', '{"gate": {"name": "x"}}'),
    *('{"gate": {"name": ["mlp"]}}', '{"gate": {"name": "mlp"}}', '{"gate": [["mlp"]]}'),
    '{"gate": {"name": "mlp", "hidden_size": 4, "device": "cpu"}}',
    '{"gate": {"name": "mlp", "hidden_size": "4"}}',
    '{"gate": {"name": "linear", "hidden_size": 4, "bias_init": NaN}}',
    '{"gate": {"name": "fixed_depth", "exit_index": -1}}',
    '{"gate": [{"same_as": 0}]}',
    '{"exits": [1, 2], "gate": ["mlp", {"same_as": 0}]}',
    '{"exits": [1, 2], "gate": [{"name": "cosine"}, {"same_as": false}]}',
    '{"exits": [1, 2], "gate": [{"name": "cosine"}, {"same_as": 0, "name": "mlp"}]}',
]


@pytest.mark.parametrize("text", BAD_JSON, ids=lambda text: str(text)[:50])
def test_bad_json_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        ExitConfig.from_json(text)


def test_importing_the_config_loads_no_torch() -> None:
    code = "import sys, adept_fx.config, adept_fx.errors; print('torch' in sys.modules)"
    root = Path(config_module.__file__).parents[1]
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "False"
