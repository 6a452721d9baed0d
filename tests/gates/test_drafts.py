"""Candidate tokens: a few rows of the head, exactly as the model's own forward would say them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, LlamaForCausalLM

import adept_fx
from adept_fx import ExitConfig
from adept_fx.errors import ConfigError, GateError, UnsupportedModelError
from adept_fx.gates import DraftTokens, Gate, GateInputs
from counting import counted
from models import VOCAB, tiny, tiny_config
from oracle import assert_close
from product import EXITS, raw

IDS = torch.arange(1, 22).view(3, 7)
REAL = torch.ones(3, 7, dtype=torch.bool)
REAL[0, :3] = REAL[2, :5] = False
GIVEN = {"attention_mask": REAL.long(), "position_ids": (REAL.cumsum(-1) - 1).clamp(min=0)}


class Spy(Gate):
    """Keeps what it is given; every second token leaves at the first exit."""

    needs = frozenset({"draft", "logits"})

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[GateInputs] = []

    def forward(self, tokens: GateInputs) -> Tensor:
        self.seen.append(tokens)
        return (tokens.token_index % 2).float()


@cache
def _subject(kind: str) -> Any:
    extra: dict[str, Any] = {"gemma3_text": {"final_logit_softcapping": 2.0}}
    model = tiny(kind, torch.bfloat16 if kind == "llama" else torch.float32, **extra.get(kind, {}))
    if kind == "llama":
        model.lm_head = nn.Linear(32, VOCAB, dtype=torch.bfloat16)
    return adept_fx.transform(model, ExitConfig(exits=EXITS, gate="draft"))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "cohere", "gemma3_text"])
@pytest.mark.parametrize("plan", ["dense", "compact"])
def test_candidates_are_entries_of_the_logits(kind: str, plan: str) -> None:
    """With a bias in bfloat16 (llama), a scale (cohere), a soft cap (gemma), tied embeddings."""
    gate, ee = Spy(), _subject(kind)
    ee.adept.set_gates(gate)
    ee.adept.thresholds, ee.adept.plan = 0.5, plan
    ee(IDS, **GIVEN)
    first, second = gate.seen
    assert first.logits is not None
    assert first.draft_tokens is not None
    best = first.logits.topk(4, dim=-1)
    assert torch.equal(first.draft_tokens, best.indices)
    assert torch.equal(first.need("draft"), best.values)
    assert torch.equal(first.need("draft_previous"), best.values)
    stays = first.token_index % 2 == 0
    assert len(second.hidden) == int(stays.sum()) > 0
    assert torch.equal(second.need("draft_tokens"), first.draft_tokens[stays])
    assert torch.equal(second.need("draft_previous"), best.values[stays])
    want = second.need("logits").gather(1, second.need("draft_tokens"))
    if kind == "llama":
        torch.testing.assert_close(second.need("draft"), want, rtol=2**-7, atol=2**-7)
    else:
        assert_close(second.need("draft"), want, f"{kind} {plan}")


@torch.no_grad()
@pytest.mark.parametrize("last", ["draft", "max_prob"])
def test_the_whole_head_is_applied_at_the_first_exit_alone(last: str) -> None:
    model = raw("llama")
    ee = adept_fx.transform(model, ExitConfig(exits=(1, 2, 3), gate=("draft", "draft", last)))
    ee.adept.thresholds = 0.5
    tokens = int(REAL.sum())
    products = counted(model, lambda: ee(IDS, **GIVEN))
    rows = IDS.numel() + tokens * (1 + (last == "max_prob"))  # the model's own logits, and ours
    few = 4 * tokens * (1 + (last == "draft"))
    assert products.outputs["lm_head.weight"] == rows * VOCAB + few


@torch.no_grad()
def test_the_first_draft_gate_may_be_at_any_exit_and_the_head_may_change() -> None:
    model = tiny("llama")
    ee = adept_fx.transform(model, ExitConfig(exits=(1, 2, 3), gate=("linear", "draft", "draft")))
    first, gate = Spy(), Spy()
    ee.adept.set_gates([adept_fx.gates.FixedDepth(9), first, gate])
    ee.adept.thresholds = 0.5
    model.lm_head.weight.mul_(-2)
    ee(IDS, **GIVEN)
    assert torch.equal(first.seen[0].need("draft"), first.seen[0].need("draft_previous"))
    want = gate.seen[0].need("logits").gather(1, gate.seen[0].need("draft_tokens"))
    assert_close(gate.seen[0].need("draft"), want, "changed head")
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=r"has hooks.*\n.*gate=.mlp"):
        ee(IDS, **GIVEN)
    handle.remove()
    ee(IDS, **GIVEN)


@torch.no_grad()
def test_some_of_the_early_logits_without_the_others() -> None:
    config = ExitConfig(exits=(1, 2), gate="draft", adapter_rank=4)
    ee = adept_fx.transform(tiny("llama"), config)
    for parameter in ee.adept.adapters.parameters():
        parameter.add_(0.1)
    hidden, chosen = torch.randn(5, 32), torch.arange(15).view(5, 3)
    for index in (0, 1):
        whole = ee.adept.early_logits(hidden, index)
        found = ee.adept.draft_logits(hidden, chosen, index)
        assert_close(found, whole.gather(1, chosen), f"exit {index}")


class Centred(LlamaForCausalLM):
    """Each logit depends on all others."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits - output.logits.mean(-1, keepdim=True)
        return output


class Masked(LlamaForCausalLM):
    """Some entries of the vocabulary are never said."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits[..., [7, 99]] = -1e9
        return output


class Other(nn.Linear):
    """Like what adapters and quantizers put in place of a linear layer."""


def _other() -> Any:
    model = tiny("llama", layers=2)
    model.lm_head = Other(32, VOCAB, bias=False)
    return model


def _like(kind: type) -> Any:
    torch.manual_seed(0)
    return kind(tiny_config("llama", 2)).eval()


REFUSED: dict[str, tuple[Any, str]] = {
    "centred": (lambda: _like(Centred), "Centred does more with its logits"),
    "masked": (lambda: _like(Masked), "Masked does more with its logits"),
    "other": (_other, "is a Other, not a plain nn.Linear"),
    "bare": (lambda: tiny("llama", layers=2).model, "has no head"),
    "classifier": (
        lambda: AutoModelForTokenClassification.from_config(tiny_config("llama", 2)),
        "output embedding is missing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_heads_that_are_more_than_rows_are_refused(case: str) -> None:
    make, match = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=match) as caught:
        adept_fx.transform(make(), ExitConfig(exits=(1,), gate="draft"))
    assert caught.value.step == "gates"
    assert caught.value.hint is not None


def test_a_refused_gate_leaves_the_others_in_place() -> None:
    ee = adept_fx.transform(_other(), ExitConfig(exits=(1,), gate="linear"))
    before = ee.adept.gate_list()
    with pytest.raises(UnsupportedModelError, match="plain"):
        ee.adept.set_gates(DraftTokens())
    assert ee.adept.gate_list() == before


def test_fewer_classes_than_candidates_are_refused() -> None:
    ee = adept_fx.transform(
        tiny("llama", layers=2, vocab_size=3), ExitConfig(exits=(1,), gate="draft")
    )
    with pytest.raises(GateError, match="4 candidate tokens was given 3 classes"):
        ee(torch.ones(1, 4, dtype=torch.long))


# The gate itself.


def inputs(now: Tensor, before: Tensor) -> GateInputs:
    index = torch.arange(len(now))
    shape = (len(now), 1)
    place = (torch.zeros(len(now), 8), index, index * 0, 1, "decode", 2, shape)
    return GateInputs(*place, draft=now, draft_previous=before)


def test_its_features_and_size() -> None:
    gate = DraftTokens()
    assert sum(p.numel() for p in gate.parameters()) == 12 * 512 + 512 + 512 + 1
    now, before = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gate(inputs(now, before)), torch.sigmoid(torch.full((5,), -6.0)))
    torch.nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(1))
    share = now.softmax(-1)
    features = torch.cat([now, share, share - before.softmax(-1)], -1)
    logit = (features @ gate.hidden_weight.T + gate.hidden_bias).relu() @ gate.weight + gate.bias
    torch.testing.assert_close(gate(inputs(now, before)), logit.sigmoid(), rtol=1e-4, atol=1e-5)


def test_it_learns_and_comes_back_from_json() -> None:
    gate = DraftTokens(32)
    now, before = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0))
    target = (now[:, 0] > before[:, 0]).float()
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        scores = gate(inputs(now, before))
        torch.nn.functional.binary_cross_entropy(scores, target).backward()
        optimizer.step()
    assert ((scores > 0.5) == (target > 0.5)).all()
    again = ExitConfig.from_json(ExitConfig(exits=(1,), gate=gate).to_json()).gate
    assert isinstance(again, DraftTokens)
    again.load_state_dict(gate.state_dict())
    assert torch.equal(again(inputs(now, before)), gate(inputs(now, before)))
    with pytest.raises(ConfigError, match="width"):
        DraftTokens(0)


def test_gradients_reach_it_through_the_model() -> None:
    model = tiny("llama", layers=3)
    ee = adept_fx.transform(model, ExitConfig(exits=(1, 2), gate="draft", threshold=1.0))
    scores: list[Tensor] = []
    for gate in ee.adept.gates:
        gate.register_forward_hook(lambda m, args, out: scores.append(out))
    ee.train()
    ee(IDS, **GIVEN)
    torch.stack(scores).sum().backward()
    for gate in ee.adept.gates:
        assert gate.weight.grad.abs().sum() > 0
