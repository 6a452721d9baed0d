"""What gates are given, what the handle counts, and when thresholds apply."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama

import adept_fx
from adept_fx import ExitConfig
from adept_fx.gates import FixedDepth, Gate, GateInputs
from models import tiny
from oracle import Oracle, assert_close, assert_same, cut, decoder_layers
from product import EXITS, LAYERS, raw, rewritten, set_up

IDS = torch.arange(1, 22).view(3, 7)
REAL = torch.ones(3, 7, dtype=torch.bool)
REAL[0, :3] = REAL[2, :5] = False
GIVEN = {"attention_mask": REAL.long(), "position_ids": (REAL.cumsum(-1) - 1).clamp(min=0)}
# Of every exit, who leaves: some at each, one row at the first.
SCORES = torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(9))
SCORES[:, 2] = 0.9


class Spy(Gate):
    """Keeps what it is given; its scores are those of `SCORES`."""

    def __init__(self, *needs: str, scores: Tensor = SCORES) -> None:
        super().__init__()
        self.needs = frozenset(needs)  # type: ignore[misc]
        self.scores = scores
        self.seen: list[GateInputs] = []

    def forward(self, tokens: GateInputs) -> Tensor:
        self.seen.append(tokens)
        return self.scores[tokens.exit_index, tokens.batch_index, tokens.token_index]


@torch.no_grad()
def states(model: Any) -> list[Tensor]:
    """The residual stream before each layer, and after the last."""
    found: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda m, args, kw: found.append(args[0]), with_kwargs=True)
        for layer in decoder_layers(model)
    ]
    try:
        model(IDS, **GIVEN)
    finally:
        for handle in handles:
            handle.remove()
    return found


@pytest.mark.parametrize("plan", ["dense", "compact"])
def test_what_a_gate_may_see(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ee = raw("llama"), rewritten("llama")
    real_rotary, rotated = modeling_llama.apply_rotary_pos_emb, []

    def rotary(*args: Any, **kwargs: Any) -> Any:
        rotated.append(real_rotary(*args, **kwargs))
        return rotated[-1]

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotary)
    hidden = states(model)
    monkeypatch.undo()
    with torch.no_grad():
        cache = model(IDS, **GIVEN).past_key_values
    gate = Spy("previous", "query", "key", "value", scores=SCORES * 0)
    set_up(ee, [SCORES], plan)
    ee.adept.set_gates(gate)
    with torch.no_grad():
        ee(IDS, **GIVEN)
    assert [item.exit_index for item in gate.seen] == [0, 1]
    for item, layers in zip(gate.seen, EXITS, strict=True):
        rows, columns = item.batch_index, item.token_index
        assert torch.equal(torch.stack([rows, columns], dim=1), REAL.nonzero())
        wanted = {
            "hidden": hidden[layers][REAL],
            "previous": hidden[layers - 1][REAL],
            "query": rotated[layers - 1][0].transpose(1, 2)[REAL],
            "key": cache.layers[layers - 1].keys.transpose(1, 2)[REAL],
            "value": cache.layers[layers - 1].values.transpose(1, 2)[REAL],
        }
        for name, value in wanted.items():
            assert_close(getattr(item, name), value, f"{plan} exit {layers} {name}")
        assert item.logits is None
        assert (item.phase, item.num_exits, item.batch_shape) == ("prefill", 2, (3, 7))
    set_up(ee, [SCORES], plan)


@pytest.mark.parametrize("model_type", ["llama", "cohere", "gemma3_text", "gpt2", "mixtral"])
def test_logits_are_what_the_model_would_say_there(model_type: str) -> None:
    """With the head's scale (cohere) and soft cap (gemma); gpt2 and mixtral read more outputs."""
    gate, config = Spy("logits"), ExitConfig(exits=EXITS, threshold=0.5)
    model, ee = raw("llama"), rewritten("llama")
    if model_type != "llama":
        extra: dict[str, Any] = {"gemma3_text": {"final_logit_softcapping": 2.0}}
        model = tiny(model_type, **extra.get(model_type, {}))
        ee = adept_fx.transform(model, config)
    ee.adept.set_gates(gate)
    ee.adept.thresholds = 0.5
    with torch.no_grad():
        ee(IDS, **GIVEN)
        for item, layers in zip(gate.seen, EXITS, strict=True):
            want = cut(model, layers)(IDS, **GIVEN).logits
            if item.exit_index:  # those that left attend no more, but their keys are other ones
                want = model_cut_by_exits(model, layers)
            want = want[item.batch_index, item.token_index]
            assert item.logits is not None
            assert item.logits.shape == (len(item.hidden), 128)
            assert_close(item.logits, want, f"{model_type} exit {layers}")


def model_cut_by_exits(model: Any, layers: int) -> Tensor:
    wants = (SCORES[:1] > 0.5) & REAL
    shorter = cut(model, layers)
    with Oracle(shorter, EXITS[:1]).exits_for(wants, REAL):
        return shorter(IDS, **GIVEN).logits


def test_stats_and_depths() -> None:
    ee = rewritten("llama")
    left = [(SCORES[0] > 0.5) & REAL]
    left.append((SCORES[1] > 0.5) & REAL & ~left[0])
    depth = torch.where(REAL, LAYERS, 0)
    depth[left[0]], depth[left[1]] = EXITS
    tokens = int(REAL.sum())
    seen = [tokens, tokens - int(left[0].sum())]
    for plan in ("dense", "compact"):
        set_up(ee, [SCORES] * 2, plan)
        ee.adept.stats.reset()
        with torch.no_grad():
            for _ in range(2):
                ee(IDS, **GIVEN)
        assert ee.adept.last_depth.dtype == torch.long
        assert torch.equal(ee.adept.last_depth, depth)
        stats = ee.adept.stats
        assert stats.seen == {"prefill": [2 * n for n in seen], "decode": [0, 0]}
        assert stats.exited["prefill"] == [2 * int(item.sum()) for item in left]
        assert stats.total == {"prefill": 2 * tokens * LAYERS, "decode": 0}
        assert stats.needed == {"prefill": 2 * int(depth.sum()), "decode": 0}
        ran = int(depth.sum()) if plan == "compact" else tokens * LAYERS
        assert stats.executed == {"prefill": 2 * ran, "decode": 0}
        assert stats.executed_token_layers == 2 * ran
        assert [item["exit"] for item in stats.per_exit] == list(EXITS)
        stats.reset()
        assert not stats.total_token_layers
        assert stats.seen == {"prefill": [0, 0], "decode": [0, 0]}


def test_disabled_asks_no_gate() -> None:
    model, ee = raw("llama"), rewritten("llama")
    set_up(ee, [SCORES], "dense")
    gate = Spy(scores=SCORES * 0 + 1)
    ee.adept.set_gates(gate)
    with torch.no_grad(), ee.adept.disabled(), ee.adept.disabled():
        assert_same(ee(IDS, **GIVEN).logits[REAL], model(IDS, **GIVEN).logits[REAL], "disabled")
        assert torch.equal(ee.adept.last_depth, REAL * LAYERS)
    assert not gate.seen
    with torch.no_grad():
        ee(IDS, **GIVEN)
    assert torch.equal(ee.adept.last_depth, REAL * EXITS[0])


def test_thresholds_apply_by_phase() -> None:
    model = raw("llama")
    config = ExitConfig(exits=EXITS, gate=FixedDepth(0), threshold=(0.5, 1.0), prefill_threshold=1)
    ee = adept_fx.transform(model, config)
    options = {"do_sample": False, "max_new_tokens": 3}

    def depths() -> tuple[int, int]:
        out = ee(IDS, **GIVEN)
        prefill = int(ee.adept.last_depth.amax())
        ee(IDS[:, :1], past_key_values=out.past_key_values, position_ids=REAL.sum(-1)[:, None])
        return prefill, int(ee.adept.last_depth.amax())

    with torch.no_grad():
        assert depths() == (4, 1)
        graph = ee.adept.graph
        ee.adept.thresholds = [1.0, 0.0]  # for decoding: the config tells the phases apart
        assert ee.adept.prefill_thresholds == (1.0, 1.0)
        assert depths() == (4, 3)
        ee.adept.prefill_thresholds = torch.tensor([0.25, 1.0])
        assert (ee.adept.thresholds, ee.adept.prefill_thresholds) == ((1.0, 0.0), (0.25, 1.0))
        assert depths() == (1, 3)
        assert ee.adept.graph is graph  # no recapture
    ee.generate(IDS, **options)
    assert ee.adept.stats.exited["prefill"][0] > 0
    # Without a prefill threshold of its own, one number serves both phases.
    shared = rewritten("llama")
    shared.adept.thresholds = 0.75
    assert shared.adept.thresholds == shared.adept.prefill_thresholds == (0.75, 0.75)
