"""The gate on hidden state, query, key and value: its formula, and where its sizes come from."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import adept_fx
from adept_fx import ExitConfig
from adept_fx.errors import ConfigError, GateError
from adept_fx.gates import MLP, AttentionMLP, GateInputs
from product import raw, rewritten

D = 16
SIZES = {"hidden": D, "query": 12, "key": 6, "value": 4}
# Of the tiny llama: 4 heads of 8, two for keys and values; gpt2 has four for all.
LLAMA, GPT2 = (32, 16, 16), (32, 32, 32)


def inputs(n: int = 5, scale: float = 1.0) -> GateInputs:
    make = torch.Generator().manual_seed(n)
    index = torch.arange(n)
    tokens = GateInputs(
        scale * torch.randn(n, D, generator=make), index, index, 0, "decode", 1, (n, 1)
    )
    heads = {"query": (3, 4), "key": (2, 3), "value": (2, 2)}
    given = {k: scale * torch.randn(n, *v, generator=make) for k, v in heads.items()}
    return GateInputs(**{k: getattr(tokens, k) for k in tokens.__slots__} | given)


def sized(width: int = 8) -> AttentionMLP:
    gate = AttentionMLP(D, 12, 6, 4, width)
    make = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=make))
    return gate


def sizes(gate: object) -> tuple[int, ...]:
    assert isinstance(gate, AttentionMLP)
    parts = (gate.query_weight, gate.key_weight, gate.value_weight)
    found = tuple(0 if part is None else part.shape[1] for part in parts)
    assert found == tuple(item or 0 for item in (gate.query_size, gate.key_size, gate.value_size))
    return found


def test_it_is_an_mlp_on_the_four_inputs_side_by_side() -> None:
    gate, tokens = sized(), inputs()
    parts = [tokens.hidden, *(tokens.need(name).flatten(1) for name in ("query", "key", "value"))]
    unit = torch.cat([x / x.pow(2).mean(-1, keepdim=True).sqrt() for x in parts], dim=-1)
    weights = [gate.hidden_weight, gate.query_weight, gate.key_weight, gate.value_weight]
    whole = torch.cat([w for w in weights if w is not None], dim=1)
    logit = F.gelu(F.linear(unit, whole, gate.hidden_bias)) @ gate.weight + gate.bias
    torch.testing.assert_close(gate(tokens), torch.sigmoid(logit))
    torch.testing.assert_close(gate(inputs(5, 1e4)), gate(tokens))


def test_an_untrained_one_scores_near_zero_and_can_learn() -> None:
    gate = AttentionMLP(D)
    gate.set_sizes(SIZES)
    assert torch.equal(gate(inputs()), torch.sigmoid(torch.full((5,), -6.0)))
    target = (torch.arange(12) % 2).float()
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    for _ in range(80):
        optimizer.zero_grad()
        scores = gate(inputs(12))
        F.binary_cross_entropy(scores, target).backward()
        optimizer.step()
    assert ((scores > 0.5) == (target > 0.5)).all()
    assert gate.value_weight is not None
    assert gate.value_weight.grad is not None


def test_without_sizes_it_says_so() -> None:
    gate = AttentionMLP(D, dtype=torch.bfloat16)
    with pytest.raises(GateError, match=r"does not know the sizes.*\n.*transform and set_gates"):
        gate(inputs())
    assert copy.deepcopy(gate).state_dict().keys() == gate.state_dict().keys()
    gate.to(torch.float16).set_sizes(SIZES)
    assert {parameter.dtype for parameter in gate.parameters()} == {torch.float16}


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\['query'\] of .* have a size\n.*all three"):
        AttentionMLP(D, 12)
    with pytest.raises(ConfigError, match="value_size must be a whole number"):
        AttentionMLP(D, 12, 6, 0)
    gate = sized()
    gate.set_sizes(SIZES)
    with pytest.raises(ConfigError, match="made for a key of size 6; the model has one of size 7"):
        gate.set_sizes(SIZES | {"key": 7})


def test_a_state_dict_tells_the_sizes() -> None:
    saved, tokens = sized(), inputs()
    gate = AttentionMLP(D, width=8)
    gate.load_state_dict(saved.state_dict())
    assert torch.equal(gate(tokens), saved(tokens))
    other = AttentionMLP(D, 12, 6, 5, 8)
    with pytest.raises(RuntimeError, match="size mismatch for value_weight"):
        other.load_state_dict(saved.state_dict())


def test_json_keeps_the_sizes() -> None:
    for gate in (sized(), AttentionMLP(D, width=8)):
        config = ExitConfig.from_json(ExitConfig(exits=(1,), gate=gate).to_json())
        assert isinstance(config.gate, AttentionMLP)
        assert sizes(config.gate) == sizes(gate)
        assert config.gate.width == 8


def test_transform_makes_the_parameters_and_state_dicts_load() -> None:
    shared = AttentionMLP(32, width=4)
    config = ExitConfig(exits=(1, 2, 3), gate=("attention_mlp", shared, shared))
    ee = adept_fx.transform(raw("llama"), config)
    assert [sizes(gate) for gate in ee.adept.gates] == [LLAMA] * 3
    assert ee.adept.gates[1] is ee.adept.gates[2] is shared
    state = {name: value + 0.5 for name, value in ee.adept.state_dict().items()}
    ee.adept.load_state_dict(state)
    twin = copy.deepcopy(ee)
    for name, value in state.items():
        assert torch.equal(ee.adept.state_dict()[name], value), name
        assert torch.equal(twin.adept.state_dict()[name], value), name


@torch.no_grad()
def test_set_gates_makes_the_parameters_or_leaves_all_as_it_was() -> None:
    ee, gate = rewritten("gpt2"), AttentionMLP(32)
    ee.adept.set_gates([gate, AttentionMLP(32, *GPT2)])
    assert sizes(gate) == GPT2
    before = ee.adept.gate_list()
    with pytest.raises(ConfigError, match="key of size 16; the model has one of size 32"):
        ee.adept.set_gates(AttentionMLP(32, *LLAMA))
    with pytest.raises(ConfigError, match="hidden size 8; the model has 32"):
        ee.adept.set_gates(AttentionMLP(8))
    assert ee.adept.gate_list() == before
    assert ee(torch.arange(1, 15).view(2, 7)).logits.isfinite().all()


def test_without_attention_it_is_the_mlp() -> None:
    gate, plain = sized(), MLP(D, 8)
    with torch.no_grad():
        for name in ("query_weight", "key_weight", "value_weight"):
            getattr(gate, name).zero_()
        for name in ("hidden_weight", "hidden_bias", "weight", "bias"):
            getattr(plain, name).copy_(getattr(gate, name))
    expected: Tensor = plain(inputs())
    torch.testing.assert_close(gate(inputs()), expected)
