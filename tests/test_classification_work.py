"""What a row that is done no longer costs: layers, keys, gates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adept_fx.gates import GateInputs
from classify import ENDED, LABELS, POOLED, REAL, WANTS, inputs, ready, run
from counting import Products, counted
from product import EXITS, LAYERS, PLANS, Counted, raw, rewritten, set_up


class Watched(Counted):
    """Notes which tokens each exit's gate is shown."""

    def forward(self, tokens: GateInputs) -> Tensor:
        shown = torch.zeros(tokens.batch_shape, dtype=torch.bool)
        shown[tokens.batch_index, tokens.token_index] = True
        self.shown[tokens.exit_index] = shown
        return super().forward(tokens)

    shown: dict[int, Tensor]


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
def test_gates_are_not_shown_rows_that_are_done(plan: str) -> None:
    _, ee, given = ready("llama", plan)
    gate = Watched([WANTS.float()])
    gate.shown = {}
    ee.adept.set_gates(gate)
    ee(**given)
    assert torch.equal(gate.shown[0], REAL)
    assert torch.equal(gate.shown[1], EXITS[0] < ENDED)


def rows_of(products: Products, part: str) -> list[int]:
    """Tokens that each layer's projection of that name was computed for."""
    names = [f"model.layers.{layer}.{part}.weight" for layer in range(LAYERS)]
    return [products.outputs[name] // products.columns[name] for name in names]


def test_a_row_that_is_done_costs_nothing() -> None:
    """No layer runs for it; keys are synthesized for tokens of rows that go on alone."""
    model, ee, given = ready("llama", "compact")
    ee(**given)  # captures, if a test before has changed the mode
    products = counted(model, lambda: ee(**given))
    live = [REAL.numel()] + [int((layer < ENDED).sum()) for layer in range(1, LAYERS)]
    assert rows_of(products, "mlp.down_proj") == live
    going = [(layer < ENDED).any(1, keepdim=True) for layer in EXITS]
    early = int(((EXITS[0] == ENDED) & going[0]).sum())
    late = int(((EXITS[1] == ENDED) & going[1]).sum())
    keys = [live[0], live[1] + early, live[2] + early, live[3] + early + late]
    assert min(early, late) > 0
    assert int(((EXITS[0] == ENDED) & ~going[0]).sum()) > 0
    assert rows_of(products, "self_attn.k_proj") == keys


@pytest.mark.parametrize("plan", ["auto", "compact"])
def test_when_all_pooled_tokens_left_nothing_runs(plan: str) -> None:
    """All others wanted to stay: no layer after the exit, no key, no attention."""
    model, ee, given = ready("llama", plan)
    wants = torch.stack([POOLED, torch.zeros_like(POOLED)])
    set_up(ee, [wants.float()] * 2, plan)
    ee(**given)
    products = counted(model, lambda: ee(**given))
    assert rows_of(products, "mlp.down_proj") == [REAL.numel(), 0, 0, 0]
    assert rows_of(products, "self_attn.k_proj") == [REAL.numel(), 0, 0, 0]
    assert products.attentions == 1
    assert torch.equal(ee.adept.last_depth, REAL.long())
    assert int(products.outputs["score.weight"]) == LABELS * REAL.numel()  # the head alone


@torch.no_grad()
def test_one_token_per_row_counts_as_decode() -> None:
    """Where `prefill_threshold` does not reach."""
    _, ee, _ = ready("llama")
    set_up(ee, [torch.ones(2, 3, 1)], "auto")
    ee.adept.stats.reset()
    assert run(ee, ee.adept.decoder, {"input_ids": torch.tensor([[4], [5], [6]])})[0].logits.shape
    assert ee.adept.stats.as_dict()["decode"]["exited"] == [3, 0]


@pytest.mark.parametrize("use_cache", [False, True])
def test_keys_that_nobody_reads(use_cache: bool) -> None:
    """Of a causal LM: without a cache, a row that has left as a whole owes none."""
    wants = torch.zeros(2, *REAL.shape, dtype=torch.bool)
    wants[0, :2] = wants[0, :, :6] = True
    wants[1] = True
    model, ee = raw("llama"), rewritten("llama")
    set_up(ee, [wants.float()], "compact")
    given = inputs("llama", REAL) | {"use_cache": use_cache}
    products = counted(model, lambda: ee(**given))
    stay, left = REAL & ~wants[0], REAL & wants[0]
    live, owed = int(stay.sum()), int((left & stay.any(1, keepdim=True)).sum())
    assert 0 < owed < int(left.sum())
    if use_cache:
        want = [REAL.numel(), *[int(REAL.sum())] * 3]
    else:
        want = [REAL.numel(), live + owed, live + owed, owed]
    assert rows_of(products, "self_attn.k_proj") == want
    assert rows_of(products, "mlp.down_proj") == [REAL.numel(), live, live, 0]
