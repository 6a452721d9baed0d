"""The gates: contract, numbers, building, replay."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adept_fx import gates
from adept_fx.config import ExitConfig
from adept_fx.errors import ConfigError, GateError
from adept_fx.gates import MLP, Cosine, Entropy, FixedDepth, Gate, GateInputs, Linear
from adept_fx.gates.max_prob import MaxProb
from adept_fx.gates.registry import GATES, build_gates
from adept_fx.gates.replay import Replay
from adept_fx.gates.top_gap import TopGap

D, V = 16, 11
SIZES = {"hidden": D, "query": 12, "key": 6, "value": 4}
OPTIONAL = ("previous", "query", "key", "value", "logits", "position", "draft", "draft_previous")
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
deterministic = settings(deadline=None, derandomize=True, max_examples=40)


def inputs(n: int = 5, dtype: torch.dtype = torch.float32, **changes: Any) -> GateInputs:
    """`n` random tokens of a forward of shape `[2, 3]`, with everything a gate may need."""
    make = torch.Generator().manual_seed(n)
    states = torch.randn(2, n, D, generator=make).to(dtype)
    index = torch.arange(n)
    logits = torch.randn(n, V, generator=make).to(dtype)
    tokens = GateInputs(states[0], index // 3, index % 3, 0, "prefill", 2, (2, 3), states[1])
    heads = {"query": (3, 4), "key": (2, 3), "value": (2, 2)}
    given = {k: torch.randn(n, *v, generator=make).to(dtype) for k, v in heads.items()}
    given |= {"logits": logits, "position": index * 700}
    given |= {"draft": logits[:, :4], "draft_previous": logits[:, 4:8]}
    return dataclasses.replace(tokens, **{**given, **changes})


def trained(gate: Gate) -> Gate:
    """Fills the parameters of a gate with numbers that make it look at its input."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return gate


def make(name: str) -> Gate:
    gate = build_gates(ExitConfig((1,), name), D)[0]
    gate.set_sizes(SIZES)
    return trained(gate)


# The contract, for every gate that has a name.


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("name", GATES)
def test_scores_are_float32_in_the_unit_interval(name: str, n: int, dtype: torch.dtype) -> None:
    gate = make(name).to(dtype)
    scores = gate(inputs(n, dtype))
    assert scores.shape == (n,)
    assert scores.dtype == torch.float32
    assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize("name", GATES)
def test_a_token_is_scored_on_its_own(name: str) -> None:
    gate, tokens = make(name), inputs(5)
    names = ("hidden", *OPTIONAL)
    alone = [inputs(1, **{name: getattr(tokens, name)[[i]] for name in names}) for i in range(5)]
    torch.testing.assert_close(torch.cat([gate(token) for token in alone]), gate(tokens))


@pytest.mark.parametrize("name", GATES)
def test_a_gate_reads_only_what_it_needs(name: str) -> None:
    gate, tokens = make(name), inputs(3)
    for key in OPTIONAL:
        without = inputs(3, torch.float32, **{key: None})
        if key.removesuffix("_previous") not in gate.needs:
            assert torch.equal(gate(without), gate(tokens))
            continue
        with pytest.raises(GateError, match=key):
            gate(without)


@pytest.mark.parametrize("name", sorted(set(GATES) - {"fixed_depth", "schedule"}))
def test_nan_gives_nan_for_that_token_only(name: str) -> None:
    tokens = inputs(3)
    for tensor in (tokens.hidden, tokens.need("logits"), tokens.need("draft")):
        tensor[1] = math.nan
    assert make(name)(tokens).isnan().tolist() == [False, True, False]


def test_every_gate_of_the_registry_is_exported_and_may_be_compiled() -> None:
    assert {kind.__name__ for kind in GATES.values()} <= set(gates.__all__)
    assert not any(kind.keeps_python_state for kind in GATES.values())


# Learned gates.

learned = pytest.mark.parametrize("kind", [Linear, MLP])


@learned
@deterministic
@given(scale=st.floats(1e-6, 1e15), seed=st.integers(0, 99))
def test_an_untrained_gate_scores_near_zero_whatever_it_sees(kind, scale, seed) -> None:
    hidden = torch.randn(4, D, generator=torch.Generator().manual_seed(seed)) * scale
    scores = kind(D)(inputs(4, hidden=hidden))
    assert torch.equal(scores, torch.sigmoid(torch.full((4,), -6.0)))


@learned
def test_an_untrained_gate_can_learn(kind) -> None:
    gate = kind(D)
    gate(inputs()).sum().backward()
    assert gate.weight.grad.abs().min() > 0
    assert gate.bias.grad.abs().min() > 0
    hidden = torch.cat([torch.eye(D)[:4], -torch.eye(D)[:4]])
    target = (torch.arange(8) < 4).float()
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        scores = gate(inputs(8, hidden=hidden))
        torch.nn.functional.binary_cross_entropy(scores, target).backward()
        optimizer.step()
    assert ((scores > 0.5) == (target > 0.5)).all()


@learned
def test_scores_do_not_depend_on_the_scale_of_the_model(kind) -> None:
    assert trained(kind(D))(inputs(1, hidden=torch.zeros(1, D))).isfinite()
    gate, tokens = trained(kind(D)), inputs()
    for scale in (1e-8, 1e-4, 1e8):
        scaled = dataclasses.replace(tokens, hidden=tokens.hidden * scale)
        torch.testing.assert_close(gate(scaled), gate(tokens), rtol=1e-5, atol=1e-6)


@learned
def test_half_precision_states_are_scored_in_float32(kind) -> None:
    gate, tokens = trained(kind(D)), inputs(5, torch.bfloat16)
    exact = dataclasses.replace(tokens, hidden=tokens.hidden.float())
    assert torch.equal(gate(tokens), gate(exact))


@learned
def test_device_dtype_and_bias_reach_the_parameters(kind) -> None:
    gate = kind(D, device="meta", dtype=torch.bfloat16, bias_init=-1.0)
    assert not list(gate.children()), "a linear submodule would be wrapped by adapters"
    for parameter in gate.parameters():
        assert parameter.device.type == "meta"
        assert parameter.dtype == torch.bfloat16
    gate = gate.to_empty(device="cpu")
    gate.reset_parameters()
    torch.testing.assert_close(gate(inputs(1)), torch.sigmoid(torch.tensor([-1.0])))


@learned
@pytest.mark.parametrize(
    "options", [{"hidden_size": 0}, {"hidden_size": True}, {"hidden_size": 4, "bias_init": "x"}]
)
def test_bad_options_of_learned_gates_are_refused(kind, options: dict) -> None:
    with pytest.raises(ConfigError, match=list(options)[-1]):
        kind(**options)


@pytest.mark.parametrize("width", [0, -1, 2.0, True])
def test_bad_widths_are_refused(width) -> None:
    with pytest.raises(ConfigError, match="width"):
        MLP(4, width)


# Confidence gates.


@pytest.mark.parametrize(
    ("logits", "max_prob", "top_gap", "entropy"),
    [
        ([0.0, 0.0, 0.0, 0.0], 0.25, 0.0, 0.0),
        ([200.0, 0.0, 0.0, 0.0], 1.0, 1.0, 1.0),
        ([0.0, 0.0, -math.inf, -math.inf], 0.5, 0.0, 0.5),
        ([math.log(3.0), 0.0, -math.inf, -math.inf], 0.75, 0.5, 0.59436),
        ([5e4, 5e4, 0.0, 0.0], 0.5, 0.0, 0.5),
    ],
)
def test_confidence_of_known_distributions(logits, max_prob, top_gap, entropy) -> None:
    tokens = inputs(1, logits=torch.tensor([logits]))
    scores = [gate(tokens).item() for gate in (MaxProb(), TopGap(), Entropy())]
    assert scores == pytest.approx([max_prob, top_gap, entropy], abs=1e-5)


@deterministic
@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=9))
def test_confidence_equals_the_textbook_in_float64(values: list[float]) -> None:
    tokens = inputs(1, logits=torch.tensor([values]))
    probs = torch.tensor([values], dtype=torch.float64).softmax(-1)
    best = probs.sort(descending=True).values
    entropy = torch.distributions.Categorical(probs).entropy()
    for gate, expected in [
        (MaxProb(), best[:, 0]),
        (TopGap(), best[:, 0] - best[:, 1]),
        (Entropy(), 1 - entropy / math.log(len(values))),
    ]:
        torch.testing.assert_close(gate(tokens).double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("gate", [MaxProb(), TopGap(), Entropy()])
def test_a_single_class_is_refused(gate: Gate) -> None:
    with pytest.raises(GateError, match="at least 2 classes"):
        gate(inputs(2, logits=torch.zeros(2, 1)))


@pytest.mark.parametrize(
    ("previous", "expected"),
    [([2.0, 0.0], 1.0), ([-1.0, 0.0], 0.0), ([0.0, 3.0], 0.0), ([1.0, 1.0], 0.5**0.5)],
)
def test_cosine_of_known_vectors(previous: list[float], expected: float) -> None:
    tokens = inputs(1, hidden=torch.tensor([[1.0, 0.0]]), previous=torch.tensor([previous]))
    assert Cosine()(tokens).item() == pytest.approx(expected)


@pytest.mark.parametrize("exit_index", [0, 1, 2, 5])
def test_fixed_depth_leaves_from_its_exit_on(exit_index: int) -> None:
    gate = FixedDepth(exit_index)
    scores = [gate(inputs(2, exit_index=i, num_exits=4)).tolist() for i in range(4)]
    assert scores == [[float(i >= exit_index)] * 2 for i in range(4)]


@pytest.mark.parametrize("exit_index", [-1, True, 1.0, None])
def test_fixed_depth_refuses_what_is_no_index(exit_index) -> None:
    with pytest.raises(ConfigError, match="exit_index"):
        FixedDepth(exit_index)


# Replay.


def test_replay_plays_one_tensor_per_forward() -> None:
    scores = [torch.rand(2, 2, 3), torch.rand(2, 2, 3)]
    gate = Replay(scores)
    for expected in scores:
        assert torch.equal(gate(inputs(6)), expected[0].flatten())
        later = inputs(2, exit_index=1, batch_index=torch.tensor([1, 0]))
        assert torch.equal(gate(later), expected[1, [1, 0], [0, 1]])


def test_replay_takes_its_tensor_with_no_token_and_may_skip_later_exits() -> None:
    gate = Replay([torch.zeros(2, 2, 3), torch.ones(2, 2, 3)])
    assert gate(inputs(0)).shape == (0,)
    assert gate(inputs(1)).tolist() == [1.0]


def test_replay_past_the_end_raises_until_reset() -> None:
    gate = Replay([torch.rand(2, 2, 3)])
    first = gate(inputs(6))
    with pytest.raises(GateError, match=r"1 forward calls; this is number 2\n.*reset"):
        gate(inputs(6))
    gate.reset()
    assert torch.equal(gate(inputs(6)), first)


@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 1, 3), (2, 2, 4), (2, 3), (2, 2, 3, 1), ()])
def test_replay_refuses_a_wrong_shape_and_takes_nothing(shape: tuple[int, ...]) -> None:
    gate = Replay([torch.zeros(shape)])
    for _ in range(2):
        with pytest.raises(GateError, match=r"call 1, which has .* = \(2, 2, 3\)"):
            gate(inputs(6))


def test_replay_checks_the_shape_at_later_exits_too() -> None:
    gate = Replay([torch.zeros(2, 2, 3)])
    gate(inputs(6))
    with pytest.raises(GateError, match="shape"):
        gate(inputs(6, exit_index=1, batch_shape=(2, 4)))


def test_replay_refuses_a_later_exit_before_the_first() -> None:
    with pytest.raises(GateError, match="exit 1 but never was at exit 0"):
        Replay([torch.zeros(2, 2, 3)])(inputs(6, exit_index=1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_replay_keeps_floating_scores_exact(dtype: torch.dtype) -> None:
    scores = torch.rand(2, 2, 3, dtype=torch.float64).to(dtype)
    played = Replay([scores]).to(torch.float16)(inputs(6))
    assert played.dtype == dtype
    assert torch.equal(played, scores[0].flatten())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_replay_reads_other_scores_as_float32(dtype: torch.dtype) -> None:
    played = Replay([torch.ones(2, 2, 3, dtype=dtype)])(inputs(6))
    assert played.dtype == torch.float32
    assert played.tolist() == [1.0] * 6


def test_replay_registers_no_tensor_and_says_that_it_keeps_state() -> None:
    gate = Replay([torch.nn.Parameter(torch.zeros(2, 2, 3))])
    gate(inputs(6))
    assert gate.keeps_python_state
    assert not gate.state_dict()
    assert not list(gate.parameters())
    assert not list(gate.buffers())


def test_replay_can_be_deep_copied_and_then_plays_on_its_own() -> None:
    gate = Replay([torch.rand(2, 2, 3, requires_grad=True) * 2, torch.rand(2, 2, 3)])
    gate(inputs(6))
    other = copy.deepcopy(gate)
    assert torch.equal(other(inputs(6)), gate(inputs(6)))
    other.reset()
    other(inputs(6))
    with pytest.raises(GateError, match="number 3"):
        gate(inputs(6))


@pytest.mark.parametrize("scores", [torch.zeros(2, 2, 3), None, {}, [[0.5]], ["x"]])
def test_replay_refuses_what_is_no_list_of_tensors(scores) -> None:
    with pytest.raises(ConfigError, match="scores"):
        Replay(scores)


# The base class and building.


def test_the_base_class_scores_nothing() -> None:
    with pytest.raises(NotImplementedError, match="Gate does not implement"):
        Gate()(inputs())


@pytest.mark.parametrize("needs", ["logits", {"logit"}, frozenset({"hidden"}), ["logits"], {3}])
def test_unknown_needs_are_refused_where_the_class_is_written(needs) -> None:
    with pytest.raises(ConfigError, match=r"Bad\.needs"):
        type("Bad", (Gate,), {"needs": needs})


def test_needs_are_normalized_and_inherited() -> None:
    class Parent(Gate):
        needs = {"key", "value"}  # type: ignore[assignment]  # noqa: RUF012

    class Child(Parent):
        pass

    assert Child.needs == frozenset({"key", "value"})
    assert isinstance(Child.needs, frozenset)


def test_needs_of_an_instance_are_checked_when_it_is_built() -> None:
    gate = FixedDepth()
    gate.needs = frozenset({"weather"})
    with pytest.raises(ConfigError, match="weather"):
        build_gates(ExitConfig(exits=(1,), gate=gate), D)


def test_inputs_are_frozen_and_name_what_is_missing() -> None:
    tokens = inputs(query=None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tokens.phase = "decode"  # type: ignore[misc]
    for name in ("query", "hidden", "weather"):
        with pytest.raises(GateError, match=name):
            tokens.need(name)


def test_a_name_makes_a_fresh_gate_per_exit() -> None:
    config = ExitConfig("every:2", "linear").resolve(7)
    built = build_gates(config, D, "meta", torch.bfloat16)
    assert [type(gate) for gate in built] == [Linear] * 3
    assert len({id(gate) for gate in built}) == 3
    assert all(p.dtype == torch.bfloat16 and p.is_meta for g in built for p in g.parameters())


def test_an_instance_is_used_as_it_is_and_shared() -> None:
    gate = MLP(D)
    built = build_gates(ExitConfig((1, 2, 3), (gate, "cosine", gate)), D, "meta", torch.bfloat16)
    assert built[0] is gate
    assert built[2] is gate
    assert isinstance(built[1], Cosine)
    assert gate.weight.dtype == torch.float32
    assert build_gates(ExitConfig((1, 2), gate), D) == [gate, gate]


def test_building_needs_explicit_exits_and_the_right_size() -> None:
    with pytest.raises(ConfigError, match="resolve"):
        build_gates(ExitConfig(), D)
    with pytest.raises(ConfigError, match=f"hidden size 8; the model has {D}"):
        build_gates(ExitConfig((1,), Linear(8)), D)


def test_gates_compile_into_one_graph_for_any_number_of_tokens() -> None:
    built = [make(name) for name in GATES]

    def score(hidden: torch.Tensor, index: torch.Tensor) -> list[torch.Tensor]:
        states = {"previous": hidden + 1, "logits": hidden, "position": index}
        states |= {"draft": hidden[:, :4], "draft_previous": hidden[:, 4:8]}
        heads = {"query": hidden[:, :12], "key": hidden[:, :6], "value": hidden[:, :4]}
        states |= {name: value.unflatten(1, (2, -1)) for name, value in heads.items()}
        tokens = GateInputs(hidden, index, index, 0, "decode", 1, (8, 1), **states)
        return [gate(tokens) for gate in built]

    compiled = torch.compile(score, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 0, 3):
        hidden, index = inputs(n).hidden, torch.zeros(n, dtype=torch.long)
        torch.testing.assert_close(compiled(hidden, index), score(hidden, index))
