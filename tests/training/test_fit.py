"""`adept_fx.fit`: what is trained, what is not, and that it gets better."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adept_fx
from adept_fx.gates import MLP, Gate, GateInputs, Linear, MaxProb
from adept_fx.training.config import PARTS
from adept_fx.training.losses import agreement_loss, preference_loss
from adept_fx.training.trainee import Trainee, only_trainable
from micro import changed, everything, rewritten, settings, texts, weights

PREFIX = {"gates": "adept.gates.", "adapters": "adept.adapters.", "kv_maps": "adept.kv_maps."}
CHOICES = [*((part,) for part in PARTS), ("gates", "adapters"), ("adapters", "kv_maps"), None]


@pytest.mark.parametrize("train", CHOICES)
def test_what_is_named_is_trained_and_nothing_else(train: tuple[str, ...] | None) -> None:
    ee = everything()
    before = weights(ee)
    result = adept_fx.fit(ee, texts(16, 0), settings(train=train))
    assert result.parts == (train or PARTS)
    found = changed(ee, before)
    for part, prefix in PREFIX.items():
        trained = {name for name in found if name.startswith(prefix)}
        assert bool(trained) == (part in result.parts), part
    assert all(name.startswith(tuple(PREFIX.values())) for name in found)
    assert all(parameter.grad is None for parameter in ee.parameters())


@pytest.mark.parametrize("train", CHOICES)
def test_gradients_reach_all_that_is_trained(train: tuple[str, ...] | None) -> None:
    ee = everything(kv="map_per_layer")
    parts = train or PARTS
    with torch.no_grad():
        for name, parameter in ee.adept.named_parameters():
            if name.endswith(("up", "weight")):
                parameter.normal_(std=0.1)
    given = {"input_ids": texts(6, 1), "attention_mask": torch.ones(6, 32, dtype=torch.long)}
    with only_trainable(ee, parts):
        assert {n for n, p in ee.named_parameters() if p.requires_grad} == {
            n for n, _ in ee.named_parameters() if n.startswith(tuple(PREFIX[p] for p in parts))
        }
        Trainee(ee, settings(), parts)(**given)["loss"].backward()
        for name, parameter in ee.named_parameters():
            reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
            assert reached == parameter.requires_grad, name


def test_it_gets_better() -> None:
    ee = rewritten(adapter_rank=16)
    options = settings(
        steps=60, batch_size=8, tokens_per_step=256, learning_rate=1e-2,
        trainer={"logging_steps": 10},
    )  # fmt: skip
    result = adept_fx.fit(ee, texts(480, 2), options)
    first, last = result.history[0], result.history[-2]
    assert last["loss"] < 0.6 * first["loss"]
    for layers in result.exits:
        assert last[f"kl_{layers}"] < first[f"kl_{layers}"]
        assert last[f"gate_loss_{layers}"] < first[f"gate_loss_{layers}"]
    assert last["agreement_1"] > first["agreement_1"] + 0.02
    assert _auc(ee, texts(64, 3)) > 0.56
    assert "after 1 layers: agreement" in str(result)
    assert (result.steps, result.last("step")) == (60, 60)


@torch.no_grad()
def _auc(ee: Any, ids: Tensor) -> float:
    """How often the gate ranks a token that agrees before one that does not."""
    states: list[Any] = []
    hooked = ee.adept.gates[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    final = ee(ids).logits.flatten(0, 1).argmax(-1)
    hooked.remove()
    (seen,) = states
    score = ee.adept.gates[0](seen)
    agrees = ee.adept.early_logits(seen.hidden, 0).argmax(-1) == final
    return float((score[agrees][:, None] > score[~agrees][None]).float().mean())


@pytest.mark.parametrize("quality", ["kl", "likelihood"])
def test_the_objective_of_adept(quality: str) -> None:
    ee = everything()
    options = settings(
        steps=60, train="gates", objective="adept", quality=quality,
        quality_weight=0.2, compute_weight=2.0,
    )  # fmt: skip
    result = adept_fx.fit(ee, texts(64, 4), options)
    losses = [entry["gate_loss_1"] for entry in result.history if "gate_loss_1" in entry]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(entry["T_1"] < 0 for entry in result.history if "T_1" in entry)


def test_losses_by_hand() -> None:
    score = torch.tensor([0.9, 0.6, 0.2, 0.5])
    agrees = torch.tensor([True, True, True, False])
    yes, no = -score[:3].log().mean(), -(1 - score[3]).log()
    assert agreement_loss(score, agrees) == pytest.approx(float(0.5 * yes + 0.5 * no), rel=1e-5)
    for same in (torch.ones(4).bool(), torch.zeros(4).bool()):
        assert 0 < agreement_loss(score, same) < 2
    target = torch.sigmoid(5.0 * torch.tensor(-0.2) + 2.0 * torch.tensor(0.5))
    one = preference_loss(score[:1], torch.tensor([-0.2]), 0.5, 5.0, 2.0)
    wanted = -(target * score[0].log() + (1 - target) * (1 - score[0]).log())
    assert one == pytest.approx(float(wanted), rel=1e-5)
    sure = torch.tensor([0.0, 1.0], requires_grad=True)
    loss = agreement_loss(sure, torch.tensor([True, False]))
    assert torch.isfinite(loss)
    assert float(preference_loss(score[:0], score[:0], 0.5, 1.0, 1.0)) == 0.0


def test_likelihoods_are_of_tokens_that_have_a_next_one() -> None:
    ee = everything()
    options = settings(objective="adept", quality="likelihood", compute_weight=50.0)
    trainee = Trainee(ee, options, ("gates",))
    ids = texts(1, 5)[:, :2]
    both = float(trainee(input_ids=ids, attention_mask=torch.ones_like(ids))["loss"].detach())
    # A new gate says the same of every token: more of those without a next one change nothing.
    padded = torch.nn.functional.pad(ids, (0, 3))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 3))
    again = float(trainee(input_ids=padded, attention_mask=mask)["loss"].detach())
    # A target of about 1, and a score of sigmoid(-6), at each of two exit points.
    assert again == pytest.approx(both) == pytest.approx(12.0, abs=0.1)


@pytest.mark.slow
def test_seeds_decide_everything() -> None:
    found: list[Any] = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(found))
        ee = everything()
        result = adept_fx.fit(ee, texts(16, 6), settings(seed=seed, tokens_per_step=20))
        found.append((weights(ee), [entry.get("loss") for entry in result.history]))
    assert found[0][1] == found[1][1] != found[2][1]
    assert all(torch.equal(found[0][0][name], found[1][0][name]) for name in found[0][0])


class Shared(MLP):
    """Counts how often it is asked."""


def test_one_gate_may_serve_all_exits() -> None:
    gate = Shared(32)
    ee = everything(gate)
    before = weights(ee)
    adept_fx.fit(ee, texts(16, 7), settings(train="gates"))
    assert ee.adept.gates[0] is ee.adept.gates[1] is gate
    assert {name.split(".")[2] for name in changed(ee, before)} == {"0", "1"}


def test_gates_without_parameters_stay() -> None:
    ee = everything([MaxProb(), Linear(32)])
    before = weights(ee)
    result = adept_fx.fit(ee, texts(16, 8), settings(train="gates"))
    assert {name.split(".")[2] for name in changed(ee, before)} == {"1"}
    names = {name for entry in result.history for name in entry}
    assert "gate_loss_2" in names
    assert "gate_loss_1" not in names
    assert "agreement_1" in names


class Reads(Gate):
    """Learns from all that a gate may be given."""

    needs = frozenset({"previous", "query", "key", "value", "logits"})

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6))

    def forward(self, tokens: GateInputs) -> Tensor:
        found = (tokens.previous, tokens.query, tokens.key, tokens.value, tokens.logits)
        values = (tokens.hidden, *(value for value in found if value is not None))
        columns = [v.float().flatten(1).square().mean(1).clamp(max=4) for v in values]
        return torch.sigmoid(torch.stack(columns, 1) @ self.weight)


@pytest.mark.parametrize("mode", ["online", "cached"])
def test_gates_are_given_all_that_they_need(mode: str, tmp_path: Any) -> None:
    ee = everything([Reads(), Reads()])
    cached = {"mode": mode, "cache_dir": tmp_path, "cached_tokens": 200}
    adept_fx.fit(ee, texts(16, 9), settings(train="gates", **cached))
    assert all(bool((gate.weight != 0).all()) for gate in ee.adept.gates)
