"""What was saved comes back."""

from __future__ import annotations

import json
import os
import pickletools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adept_fx
from adept_fx import ExitConfig
from adept_fx.errors import ConfigError, UnsupportedModelError
from adept_fx.gates import MLP, FixedDepth, Gate, GateInputs, Linear
from classify import classifier
from shared_exits import CARD, CONFIG, TENSORS, made, said, trained

PROMISE = {
    "decode": {"agreement": 0.97, "confidence": 0.9, "data": "/home/someone/secret/code.txt"},
    "prefill": {"agreement": 0.99, "note": "read from ~/secret/code.txt"},
}


def gates(kind: str) -> Any:
    return {
        "mlp": "mlp",
        "max_prob": "max_prob",
        "shared": MLP(32, width=8, bias_init=-1.0),
        "mixed": (Linear(32), FixedDepth(2)),
    }[kind]


@pytest.mark.parametrize("kind", ["mlp", "max_prob", "shared", "mixed"])
def test_outputs_and_parameters_are_bitwise_equal(kind: str, tmp_path: Path) -> None:
    model, ee = made(gates(kind))
    want, depth = said(ee)
    adept_fx.save(ee, tmp_path)
    before = torch.get_rng_state()
    again = adept_fx.load(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    got, also = said(again)
    assert torch.equal(got, want)
    assert torch.equal(depth, also)
    if kind != "max_prob":
        assert len(depth.unique()) > 1  # else nothing was tested
    assert again.adept.state_dict().keys() == ee.adept.state_dict().keys()
    for name, value in ee.adept.state_dict().items():
        assert torch.equal(again.adept.state_dict()[name], value), name
    for old, new in zip(ee.adept.gate_list(), again.adept.gate_list(), strict=True):
        assert type(new) is type(old)
        assert not new.training  # like its model
    first, second = again.adept.gate_list()
    assert (first is second) == (kind == "shared")
    again.adept.thresholds = 0.9  # one threshold for both phases stays one
    assert again.adept.prefill_thresholds == (0.9, 0.9)


def test_saving_what_was_loaded_writes_the_same(tmp_path: Path) -> None:
    model, ee = made(Linear(32))
    ee.adept.thresholds, ee.adept.prefill_thresholds = (0.4, 0.6), 0.8
    ee.adept.calibration = {"decode": {"agreement": 0.97}}
    adept_fx.save(ee, tmp_path / "a")
    adept_fx.save(adept_fx.load(model, tmp_path / "a"), tmp_path / "b")
    for name in (CARD, CONFIG, TENSORS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_present_thresholds_gates_and_calibration_are_saved(tmp_path: Path) -> None:
    model, ee = made("max_prob")
    ee.adept.set_gates([Linear(32), MLP(32)])
    trained(ee)
    ee.adept.thresholds = (0.25, 0.5)
    ee.adept.prefill_thresholds = 0.75
    ee.adept.calibration = PROMISE
    adept_fx.save(ee, tmp_path)
    again = adept_fx.load(model, tmp_path)
    assert again.adept.thresholds == again.adept.config.thresholds == (0.25, 0.5)
    assert again.adept.prefill_thresholds == (0.75, 0.75)
    assert [type(gate) for gate in again.adept.gate_list()] == [Linear, MLP]
    assert again.adept.calibration["decode"]["agreement"] == 0.97
    again.adept.thresholds = 0.1
    assert again.adept.prefill_thresholds == (0.75, 0.75)


def test_gates_keep_their_dtypes_over_a_bf16_base(tmp_path: Path) -> None:
    model, ee = made((Linear(32, dtype=torch.float32), "linear"), torch.bfloat16)
    adept_fx.save(ee, tmp_path)
    again = adept_fx.load(model, tmp_path)
    assert [gate.bias.dtype for gate in again.adept.gates] == [torch.float32, torch.bfloat16]
    for one, other in zip(said(ee), said(again), strict=True):
        assert torch.equal(one, other)


def test_a_classifier_comes_back(tmp_path: Path) -> None:
    model = classifier("llama")
    ee = trained(adept_fx.transform(model, ExitConfig((1, 3), "linear", threshold=0.5)))
    adept_fx.save(ee, tmp_path)
    assert torch.equal(said(adept_fx.load(model, str(tmp_path)))[0], said(ee)[0])


def test_only_the_three_files_are_written_and_nothing_is_pickled(tmp_path: Path) -> None:
    _, ee = made()
    adept_fx.save(ee, tmp_path)
    adept_fx.save(ee, tmp_path)  # again, over the first
    assert sorted(os.listdir(tmp_path)) == sorted([CARD, CONFIG, TENSORS])
    for name in (CARD, CONFIG, TENSORS):
        data = (tmp_path / name).read_bytes()
        assert len(data) < 16_000  # the base is not in it
        with pytest.raises(ValueError, match=r".*"):
            list(pickletools.genops(data))


def test_no_absolute_path_is_written(tmp_path: Path) -> None:
    _, ee = made()
    ee.name_or_path = str(tmp_path / "home")
    ee.adept.calibration = PROMISE
    adept_fx.save(ee, tmp_path / "exits")
    for name in (CARD, CONFIG, TENSORS):
        data = (tmp_path / "exits" / name).read_bytes()
        assert str(tmp_path).encode() not in data
        assert b"secret" not in data
        assert b"someone" not in data
    assert json.loads((tmp_path / "exits" / CONFIG).read_text())["base"]["name"] is None


def test_the_card(tmp_path: Path) -> None:
    _, ee = made(("linear", "max_prob"))
    ee.adept.thresholds = (0.25, 0.5)
    ee.name_or_path = "some-one/llama_3.1"
    ee.adept.calibration = PROMISE | {"<script>": {"a": 1}}
    adept_fx.save(ee, tmp_path)
    text = (tmp_path / CARD).read_text()
    _, front, body = text.split("---\n", 2)
    assert front.splitlines() == [
        "library_name: adept-fx",
        'base_model: "some-one/llama_3.1"',
        "tags:",
        "- early-exit",
    ]
    assert 'LlamaForCausalLM.from_pretrained("some-one/llama_3.1")' in body
    assert "adept_fx.load(model," in body
    assert "| 1 | linear | 0.25 | 0.25 |\n| 2 | max_prob | 0.5 | 0.5 |" in body
    assert "- decode (single tokens): agreement 0.97, confidence 0.9, data code.txt" in body
    assert "The base model is not included." in body
    assert "script" not in body
    for name in ("../up", "/abs/olute", "a/b/c", "tests", "x\nlicense: mit", "", None):
        ee.name_or_path = name  # `tests` is a folder here
        adept_fx.save(ee, tmp_path)
        assert "base_model" not in (tmp_path / CARD).read_text(), name


def test_a_users_card_is_kept(tmp_path: Path) -> None:
    _, ee = made()
    (tmp_path / CARD).write_text("# Mine\n")
    adept_fx.save(ee, tmp_path)
    assert (tmp_path / CARD).read_text() == "# Mine\n"
    (tmp_path / CARD).unlink()
    adept_fx.save(ee, tmp_path)
    first = (tmp_path / CARD).read_text()
    ee.adept.thresholds = 0.125
    adept_fx.save(ee, tmp_path)
    assert (tmp_path / CARD).read_text() != first  # ours follows


class Own(Gate):
    def forward(self, tokens: GateInputs) -> Tensor:
        return tokens.hidden.new_zeros(len(tokens.hidden))


def _own(ee: Any) -> None:
    ee.adept.set_gates(Own())


def _nan(ee: Any) -> None:
    ee.adept.gates[1].bias.data.fill_(float("nan"))


def _meta(ee: Any) -> None:
    ee.adept.gates[1].bias = nn.Parameter(torch.empty(1, device="meta"))


def _calibration(ee: Any) -> None:
    ee.adept.calibration = {"decode": torch.zeros(1)}


def _infinite(ee: Any) -> None:
    ee.adept.calibration = {"decode": float("inf")}


def _list(ee: Any) -> None:
    ee.adept.calibration = [1]


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (_own, "gate Own"),
        (_nan, r"gates\.1\.bias holds values that are not finite"),
        (_meta, r"gates\.1\.bias is no plain tensor"),
        (_calibration, "calibration cannot be written"),
        (_infinite, "calibration cannot be written"),
        (_list, "calibration must be a dict"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(
    spoil: Any, word: str, tmp_path: Path
) -> None:
    _, ee = made()
    spoil(ee)
    for write in (lambda: adept_fx.save(ee, tmp_path), lambda: ee.save_pretrained(tmp_path)):
        with pytest.raises(ConfigError, match=word):
            write()
    assert not os.listdir(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    _, ee = made()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write exits into .*file"):
        adept_fx.save(ee, tmp_path / "file")
    with pytest.raises(UnsupportedModelError, match="not made by"):
        adept_fx.save(adept_fx.restore(ee), tmp_path)


def test_a_full_disk_leaves_the_old_files(tmp_path: Path, monkeypatch: Any) -> None:
    _, ee = made()
    adept_fx.save(ee, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    ee.adept.thresholds = 0.1
    with pytest.raises(ConfigError, match="No space left"):
        adept_fx.save(trained(ee, 6), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
