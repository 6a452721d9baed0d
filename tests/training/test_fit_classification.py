"""A classifier from training to calibrated, compiled exits."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForSequenceClassification

import adept_fx
from adept_fx import ExitConfig, FitConfig

CLASSES, LENGTH, LAYERS = 3, 12, 4


def texts(count: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Ragged texts of tokens 4 to 15, but for two, from 1 to 3: their sum says the class."""
    generator = torch.Generator().manual_seed(seed)
    two = torch.randint(1, 1 + CLASSES, (count, 2), generator=generator)
    found = []
    for pair in two:
        length = int(torch.randint(5, LENGTH + 1, (1,), generator=generator))
        ids = torch.randint(4, 16, (length,), generator=generator)
        ids[torch.randperm(length, generator=generator)[:2]] = pair
        found.append(ids)
    return found, two.sum(1) % CLASSES


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def items(count: int, seed: int, name: str = "labels") -> list[dict[str, Any]]:
    rows, labels = texts(count, seed)
    return [{"input_ids": i.tolist(), name: c} for i, c in zip(rows, labels.tolist(), strict=True)]


@cache
def trained() -> dict[str, Tensor]:
    """The weights of a model that was trained for its last layer alone."""
    model = new()
    rows, labels = texts(1920, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for at in range(0, 3 * len(rows), 32):
        at %= len(rows)
        logits = model(**padded(rows[at : at + 32])).logits
        cross_entropy(logits, labels[at : at + 32]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def new(**overrides: Any) -> Any:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        **({"pad_token_id": 0, "num_labels": CLASSES} | overrides),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForSequenceClassification(config).eval()


def rewritten(gate: str = "mlp", leave: str = "rows") -> tuple[Any, Any]:
    model = new()
    model.load_state_dict(trained())
    config = ExitConfig(exits=(1, 2), gate=gate, adapter_rank=8, leave=leave)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model, adept_fx.transform(model, config)


def settings(**overrides: Any) -> FitConfig:
    quiet = {"disable_tqdm": True}
    chosen: dict[str, Any] = {
        "steps": 60,
        "batch_size": 32,
        "learning_rate": 1e-2,
        "trainer": quiet,
    }
    return FitConfig(**(chosen | overrides))


@torch.no_grad()
def accuracy(ee: Any, exit_index: int | None, seed: int = 1) -> float:
    """Share of rows that are right if all leave at one exit; None: if none leaves."""
    rows, labels = texts(256, seed)
    gates = ee.adept.gate_list()
    ee.adept.set_gates(adept_fx.gates.FixedDepth(2 if exit_index is None else exit_index))
    ee.adept.thresholds = 0.5
    found = ee(**padded(rows)).logits.argmax(-1)
    ee.adept.set_gates(gates)
    ee.adept.thresholds = 1.0
    return float((found == labels).double().mean())


@pytest.mark.parametrize("mode", ["online", "cached"])
@pytest.mark.parametrize("leave", ["tokens", "rows"])
def test_adapters_make_exits_better(mode: str, leave: str, tmp_path: Any) -> None:
    """Above the exits nothing changes, of the model itself not a bit."""
    model, ee = rewritten(leave=leave)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = [accuracy(ee, at) for at in (0, 1, None)]
    cached = {"mode": "cached", "cache_dir": tmp_path, "cached_tokens": 512}
    adept_fx.fit(ee, items(1024, 2), settings(**(cached if mode == "cached" else {})))
    after = [accuracy(ee, at) for at in (0, 1, None)]
    assert before[2] == after[2] > 0.9
    assert after[0] > before[0] + 0.2
    assert after[1] > before[1] - 0.02
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_classes_may_have_either_name_or_be_unknown() -> None:
    """Without classes the whole model is the only teacher."""
    given = []
    for data in (items(64, 2), items(64, 2, "label"), [i["input_ids"] for i in items(64, 2)]):
        _, ee = rewritten()
        adept_fx.fit(ee, data, settings(steps=2))
        given.append(torch.cat([item.up.flatten() for item in ee.adept.adapters]).detach())
    assert torch.equal(given[0], given[1])
    assert not torch.equal(given[0], given[2])


def test_one_text_at_a_time_needs_no_padding() -> None:
    model = new(pad_token_id=None)
    model.load_state_dict(trained())
    ee = adept_fx.transform(model, ExitConfig(exits=(1,), gate="mlp", adapter_rank=2))
    result = adept_fx.fit(ee, items(8, 2), settings(steps=8, batch_size=1))
    assert 0 <= result.last("agreement_1") <= 1
    assert float(ee.adept.adapters[0].up.abs().max()) > 0


@torch.no_grad()
def test_rows_leave_as_they_were_calibrated() -> None:
    """Fitted, compiled, calibrated: the promise holds on other texts, and layers are saved."""
    model, ee = rewritten()
    with torch.enable_grad():
        adept_fx.fit(ee, items(2048, 2), settings())
    ee.adept.compile(backend="eager")
    calibrated = [item["input_ids"] for item in items(600, 3)]
    found = adept_fx.calibrate(ee, calibrated, target=0.9, batch_size=32)
    assert [part.phase for part in found.phases] == ["prefill"]
    assert found.phases[0].certified
    rows, _ = texts(512, 4)
    ee.adept.stats.reset()
    ee.adept.plan = "compact"  # by the clock, packing so small a model may not pay
    given = padded(rows)
    agreement = (ee(**given).logits.argmax(-1) == model(**given).logits.argmax(-1)).float().mean()
    assert float(agreement) > 0.88
    counts = ee.adept.stats.as_dict()["prefill"]
    assert counts["seen"][0] == len(rows)
    assert counts["executed"] < 0.9 * counts["total"]
