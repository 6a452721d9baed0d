"""What `fit` refuses, before anything is trained."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import adept_fx
from adept_fx import FitConfig
from adept_fx.errors import AdeptError, ConfigError, InputError, UnsupportedModelError
from adept_fx.gates import MaxProb
from adept_fx.training.guard import refuse_split
from adept_fx.training.result import FitResult
from micro import everything, rewritten, settings, texts
from models import tiny

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"train": "gate"}, "train='gate' is not understood"),
    ({"train": ()}, "is not understood"),
    ({"train": 3}, "train=3 is not understood"),
    ({"train": ["gates", 1]}, "is not understood"),
    ({"objective": "loss"}, "objective='loss' is unknown"),
    ({"quality": None}, "quality=None is unknown"),
    ({"mode": "offline"}, "mode='offline' is unknown"),
    ({"backbone": "full"}, "backbone='full' is unknown"),
    *(
        ({name: value}, f"{name} must be a whole number of at least 1")
        for name in ("steps", "batch_size", "tokens_per_step", "cached_tokens", "lora_rank")
        for value in (0, 1.5, True, "8")
    ),
    ({"backbone_steps": 0}, "backbone_steps must be a whole number"),
    ({"length": 1}, "length must be a whole number of at least 2"),
    ({"seed": -1}, "seed must be a whole number of at least 0"),
    ({"seed": 1 << 32}, "seed must be a whole number"),
    *(
        ({name: value}, f"{name} must be a finite number of at least 0")
        for name in ("learning_rate", "gate_learning_rate", "kv_weight", "early_exit_weight")
        for value in (-1.0, float("nan"), float("inf"), "1", True)
    ),
    ({"layer_dropout": 1.0}, "layer_dropout must be below 1"),
    ({"mode": "cached"}, "needs a cache_dir"),
    ({"mode": "cached", "cache_dir": "x", "train": "kv_maps"}, "which are not run on states"),
    ({"trainer": [("logging_steps", 1)]}, "trainer must map names to values"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FitConfig(**values)


def test_values_that_are_right() -> None:
    found = FitConfig(train=["kv_maps", "gates"], learning_rate=0)  # type: ignore[arg-type]
    assert found.train == ("gates", "kv_maps")
    assert FitConfig(train="adapters").train == ("adapters",)  # type: ignore[arg-type]


ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"fsdp": "full_shard"}, "FSDP keeps parts"),
    ({"fsdp_config": {"x": 1}}, "FSDP keeps parts"),
    ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "DeepSpeed may keep parts"),
    ({"gradient_checkpointing": True}, "exits run through a graph"),
    ({"learning_rate": 1.0}, "would contradict the FitConfig"),
    ({"max_steps": 1}, "would contradict the FitConfig"),
    ({"output_dir": "x"}, "would contradict the FitConfig"),
    ({"no_such_argument": 1}, "TrainingArguments refuses them"),
    ({"label_names": ["x"]}, "TrainingArguments refuses them"),
    ({"lr_scheduler_type": "steep"}, "TrainingArguments refuses them"),
    ({"eval_strategy": "steps", "eval_steps": 1}, "Trainer refuses its arguments"),
]


@pytest.mark.parametrize(("trainer", "message"), ARGUMENTS)
def test_arguments_of_the_trainer(trainer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adept_fx.fit(everything(), texts(4, 0), settings(trainer=trainer))


def test_models(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="fit takes a rewritten model"):
        adept_fx.fit(tiny("llama"), texts(4, 0))
    ee = everything()
    with pytest.raises(ConfigError, match="takes a FitConfig, not dict"):
        adept_fx.fit(ee, texts(4, 0), {"steps": 1})  # type: ignore[arg-type]
    monkeypatch.setattr(type(ee.adept), "compiled", property(lambda self: True))
    with pytest.raises(ConfigError, match="not compiled"):
        adept_fx.fit(ee, texts(4, 0), settings())


def test_parts_that_are_not_there() -> None:
    ee = rewritten(tiny("llama", layers=2), exits=(1,), gate="max_prob")
    for part in ("gates", "adapters", "kv_maps"):
        with pytest.raises(ConfigError, match=f"no {part} to train"):
            adept_fx.fit(ee, texts(4, 0), settings(train=part))
    with pytest.raises(ConfigError, match="nothing to train"):
        adept_fx.fit(ee, texts(4, 0), settings())
    assert adept_fx.fit(everything(MaxProb()), texts(4, 0), settings()).parts[0] != "gates"


class FullyShardedDataParallel(nn.Linear):
    """Named like the real one."""


def test_split_models() -> None:
    plain = nn.Sequential(nn.Linear(2, 2))
    refuse_split(plain)
    wrapped = type("FSDPLinear", (FullyShardedDataParallel,), {})
    with pytest.raises(UnsupportedModelError, match="module 0 is split over devices by FSDP"):
        refuse_split(nn.Sequential(wrapped(2, 2)))
    vars(plain[0].weight)["ds_id"] = 3
    with pytest.raises(UnsupportedModelError, match=r"parameter 0\.weight .* ZeRO-3"):
        refuse_split(plain)
    parallel = nn.Linear(2, 2)
    parallel._tp_size = 2  # type: ignore[assignment]
    with pytest.raises(UnsupportedModelError, match="a tensor-parallel plan"):
        refuse_split(parallel)


def test_a_model_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from adept_fx.training.trainer import _check_place

    arguments: Any = SimpleNamespace(device=torch.device("cuda", 0), n_gpu=4)
    _check_place(arguments, torch.device("cuda"))
    assert arguments._n_gpu == 1
    with pytest.raises(ConfigError, match=r"the model is on cuda:1, but .* on cuda:0"):
        _check_place(arguments, torch.device("cuda", 1))


@pytest.mark.parametrize("package", ["accelerate", "peft"])
def test_missing_packages(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "adept_fx.training.guard.find_spec",
        lambda name: None if name == package else find_spec(name),
    )
    options = settings(backbone="lora" if package == "peft" else None)
    with pytest.raises(ConfigError, match=f"needs {package}") as raised:
        adept_fx.fit(everything(), texts(4, 0), options)
    assert raised.value.hint == "pip install 'adept-fx[train]'"


def test_pictures_are_asked_for_before(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot write the file"):
        adept_fx.fit(everything(), texts(4, 0), settings(plot=tmp_path / "no" / "x.png"))
    monkeypatch.setattr("adept_fx.files.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="needs matplotlib"):
        FitResult((), (), 0, 0.0, [], []).plot(tmp_path / "x.png")


@pytest.mark.parametrize("data", [[], iter([]), [[5]], [{"input_ids": []}]])
def test_no_data(data: Any) -> None:
    with pytest.raises(InputError, match="the dataset is empty"):
        adept_fx.fit(everything(), data, settings())


@pytest.mark.parametrize("data", [["text"], [{"text": 1}], [[0.5, 1.0]], [[[1], [2, 3]]]])
def test_wrong_data(data: Any) -> None:
    with pytest.raises(AdeptError, match="item 0 of the dataset holds no token ids"):
        adept_fx.fit(everything(), data, settings())
