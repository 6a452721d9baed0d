"""`ee.save_pretrained`: a plain checkpoint of the base, and the exits beside it."""

from __future__ import annotations

import copy
import inspect
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import adept_fx
from shared_exits import CARD, CONFIG, IDS, TENSORS, fresh, made, said


def plain(folder: Path, model: Any) -> Any:
    """The base from there, by the plain class; nothing missing, nothing unexpected."""
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    return loaded


def test_base_and_exits_come_back(tmp_path: Path) -> None:
    model, ee = made("mlp")
    ee.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "adept" in name]
    again = adept_fx.load(plain(tmp_path, model), tmp_path)
    assert torch.equal(said(again)[0], said(ee)[0])
    card = (tmp_path / CARD).read_text()
    assert "The base is in this place, too." in card
    assert 'from_pretrained("FOLDER_OR_REPOSITORY")' in card
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]


def test_compiled_in_shards_and_with_a_users_card(tmp_path: Path) -> None:
    model, ee = fresh()
    want, _ = said(ee)
    adept_fx.save(ee, tmp_path / "eager")
    ee.adept.compile(backend="eager")
    said(ee)
    (tmp_path / CARD).write_text("# Mine\n")
    ee.save_pretrained(tmp_path, max_shard_size="20KB")
    assert ee.adept._forward.compiled is not None  # still
    assert (tmp_path / CONFIG).read_bytes() == (tmp_path / "eager" / CONFIG).read_bytes()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert (tmp_path / CARD).read_text() == "# Mine\n"
    assert torch.equal(said(adept_fx.load(plain(tmp_path, model), tmp_path))[0], want)


def test_a_state_dict_of_the_callers_is_what_is_saved(tmp_path: Path) -> None:
    model, ee = made()
    state = {name: value.clone() + 1 for name, value in ee.state_dict().items()}
    keys = set(state)
    ee.save_pretrained(tmp_path, state_dict=state, is_main_process=True)
    assert set(state) == keys
    base, exits = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / TENSORS)
    assert {f"adept.{name}" for name in exits} | set(base) == keys
    for name, value in base.items():
        assert torch.equal(value, state[name])
    for name, value in exits.items():
        assert torch.equal(value, state[f"adept.{name}"])
    ee.save_pretrained(tmp_path / "b", state_dict=model.state_dict())
    for name, value in load_file(tmp_path / "b" / TENSORS).items():
        assert torch.equal(value, ee.adept.state_dict()[name])


def test_other_processes_write_no_exits(tmp_path: Path) -> None:
    _, ee = made()
    ee.save_pretrained(tmp_path, is_main_process=False)
    assert not {CARD, CONFIG, TENSORS, "config.json"} & set(os.listdir(tmp_path))


def test_a_file_in_the_folders_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    made()[1].save_pretrained(tmp_path / "file")  # transformers logs, and returns
    assert (tmp_path / "file").read_text() == "mine"


def test_a_trainer_writes_such_checkpoints(tmp_path: Path) -> None:
    model, ee = fresh()
    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_steps=1
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model=ee, args=settings, train_dataset=rows).train()  # type: ignore[arg-type]
    folder = tmp_path / "checkpoint-1"
    assert {CARD, CONFIG, TENSORS, "model.safetensors"} <= set(os.listdir(folder))
    plain(folder, model)
    for name, value in load_file(folder / TENSORS).items():
        assert torch.equal(value, ee.adept.state_dict()[name])


def test_it_is_bound_to_its_own_model(tmp_path: Path) -> None:
    model, ee = made()
    assert "save_pretrained" not in vars(model)
    restored = adept_fx.restore(ee)
    assert "save_pretrained" not in vars(restored)
    twin = copy.deepcopy(ee)
    bound = vars(twin)["save_pretrained"]
    assert isinstance(bound, partial)
    assert bound.args == (twin,)
    twin.adept.thresholds = 0.25
    twin.save_pretrained(tmp_path / "twin")
    assert json.loads((tmp_path / "twin" / CONFIG).read_text())["config"]["threshold"] == [0.25] * 2
    restored.save_pretrained(tmp_path / "plain")
    assert not {CARD, CONFIG, TENSORS} & set(os.listdir(tmp_path / "plain"))
    assert list(inspect.signature(ee.save_pretrained).parameters)[:4] == [
        "save_directory",
        "is_main_process",
        "state_dict",
        "push_to_hub",
    ]


@pytest.mark.parametrize("positional", [False, True])
def test_arguments_reach_transformers(positional: bool, tmp_path: Path) -> None:
    _, ee = made()
    if positional:
        ee.save_pretrained(str(tmp_path), True, None, False, "50GB", "v1")
    else:
        ee.save_pretrained(str(tmp_path), variant="v1")
    assert (tmp_path / "model.v1.safetensors").is_file()
