"""Hidden states on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adept_fx
from adept_fx.errors import ConfigError
from adept_fx.training.cached import States, one
from adept_fx.training.examples import Examples, batch
from adept_fx.training.identity import write_json
from adept_fx.training.observe import observe
from micro import EXITS, changed, everything, settings, texts, weights


def _options(folder: Path, **others: Any) -> Any:
    return settings(mode="cached", cache_dir=folder, cached_tokens=300, **others)


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.slow
def test_it_trains_gates_and_adapters(tmp_path: Path) -> None:
    ee = everything()
    before = weights(ee)
    result = adept_fx.fit(ee, texts(16, 0), _options(tmp_path, steps=30))
    assert result.parts == ("gates", "adapters")
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert {name.split(".")[1] for name in changed(ee, before)} == {"gates", "adapters"}
    again = weights(everything())
    repeated = adept_fx.fit(everything(), texts(16, 0), _options(tmp_path, steps=30))
    assert [entry.get("loss") for entry in repeated.history] == [
        entry.get("loss") for entry in result.history
    ]
    assert again.keys() == before.keys()


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    adept_fx.fit(everything(), texts(16, 0), _options(whole))
    calls: list[int] = []

    def fails(file: Path, content: Any) -> None:
        calls.append(1)
        if len(calls) % 2 == 0:  # the values are written, the note is not
            raise KeyboardInterrupt
        write_json(file, content)

    monkeypatch.setattr("adept_fx.training.cached.write_json", fails)
    with pytest.raises(KeyboardInterrupt):
        adept_fx.fit(everything(), texts(16, 0), _options(parts))
    assert _files(parts).keys() == _files(whole).keys()
    assert _files(parts) != _files(whole)
    with pytest.raises(KeyboardInterrupt):
        adept_fx.fit(everything(), texts(16, 0), _options(parts))
    monkeypatch.undo()
    adept_fx.fit(everything(), texts(16, 0), _options(parts))
    assert _files(parts) == _files(whole)


def test_states_of_something_else_are_refused(tmp_path: Path) -> None:
    adept_fx.fit(everything(), texts(16, 0), _options(tmp_path))
    kept = _files(tmp_path)
    ee = everything()
    with torch.no_grad():
        ee.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    cases: list[tuple[Any, Any, dict[str, Any]]] = [
        (ee, texts(16, 0), {}),
        (None, texts(16, 0).flip(0), {}),
        (None, texts(16, 0), {"batch_size": 2}),
        (None, texts(16, 0), {"length": 16}),
    ]
    for model, data, options in cases:
        with pytest.raises(ConfigError, match="holds states of another model"):
            adept_fx.fit(model or everything(), data, _options(tmp_path, **options))
    (tmp_path / "states.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds states of another model"):
        adept_fx.fit(everything(), texts(16, 0), _options(tmp_path))
    assert _files(tmp_path).keys() == kept.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_states_are_those_of_the_model_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    ee = everything()
    ee.to(dtype)
    ids = [text[: 9 + at] for at, text in enumerate(texts(4, 3))]
    adept_fx.fit(ee, ids, _options(tmp_path, steps=1))
    with torch.no_grad():
        given = batch([{"input_ids": text} for text in ids], 0)
        seen = observe(ee, given, tokens=300, seed=None)
    states = States(tmp_path, len(EXITS), blocks=1, tokens=200, seed=0)
    rows = torch.randint(42, (200,), generator=torch.Generator().manual_seed(0)).sort().values
    found = one([states[0]])["observation"]
    assert torch.equal(found.targets, seen.targets[rows])
    assert torch.equal(found.final, seen.final[rows])
    for ours, theirs in zip(found.inputs, seen.inputs, strict=True):
        assert ours.hidden.dtype == dtype
        assert torch.equal(ours.hidden, theirs.hidden[rows])
    ee.float()


def test_max_prob_is_no_obstacle_to_adapters(tmp_path: Path) -> None:
    ee = everything(adept_fx.gates.MaxProb())
    result = adept_fx.fit(ee, texts(8, 0), _options(tmp_path))
    assert result.parts == ("adapters",)


def test_states_can_be_read_by_workers(tmp_path: Path) -> None:
    options = _options(tmp_path, trainer={"dataloader_num_workers": 1})
    assert adept_fx.fit(everything(), texts(16, 0), options).last("loss") > 0


def test_examples_are_a_dataset() -> None:
    found = Examples([torch.arange(3)], [1])
    assert len(found) == 1
    assert found[0]["labels"] == 1
