"""Cases, counted work, ratios and the command line of `adept-fx bench`."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import adept_fx
from adept_fx import cli, files
from adept_fx.bench import ideal, report
from adept_fx.bench.cases import Case, standard, sweep
from adept_fx.bench.measure import Times, measure
from adept_fx.bench.memory import held_by, peak
from adept_fx.bench.presets import PRESETS, build, config_of
from adept_fx.bench.result import Row
from adept_fx.bench.runner import Setting, run_case
from adept_fx.errors import ConfigError

CPU = torch.device("cpu")


def row(**other: Any) -> Row:
    given: dict[str, Any] = {
        "name": "decode 1 x 8",
        "base": 2e-3,
        "seconds": 1e-3,
        "eager": None,
        "ratio": 0.5,
        "ideal": 0.4,
        "spread": 0.01,
        "tokens": 1,
        "warm_up": {"base": 1.0, "exits": 2.0},
        "error": None,
        "memory": {"base": 1000, "exits": 1010},
    }
    return Row(**given | other)


def test_a_case_lets_its_share_of_the_real_tokens_go() -> None:
    case = Case("prefill", 4, 16, 0.5, 2, shortest=4)
    assert case.lengths() == [4, 8, 12, 16]
    mask = case.mask()
    assert mask is not None
    assert mask.sum(1).tolist() == case.lengths()
    assert mask[0, -4:].all()
    assert int(case.leaving().sum()) == 20
    assert not (case.leaving() & ~mask.bool()).any()
    assert Case("decode", 8, 16, 0.5, 2).leaving().shape == (8, 1)
    assert int(Case("decode", 8, 16, 0.5, 2).leaving().sum()) == 4
    assert "50% out at 2" in case.name


def test_cases_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="unknown phase"):
        Case("verify", 1, 8)
    with pytest.raises(ConfigError, match=r"not in 0\.\.1"):
        Case("decode", 1, 8, 1.5)


def test_a_sweep_is_every_combination() -> None:
    found = list(sweep(["prefill", "decode"], [1, 8], [16], [0.0, 1.0], 4))
    assert len(found) == 8
    assert {case.exit for case in found if not case.share} == {0}
    assert len(standard(4)) == 9


def _explained(exits: tuple[int, ...]) -> tuple[Any, Any]:
    model = build("tiny", torch.float32, CPU)
    ee = adept_fx.transform(model, adept_fx.ExitConfig(exits=exits))
    return model, ee.adept.explain()


def test_work_is_counted() -> None:
    """By hand, for 8 equal layers of width 64, with keys and values of 64 numbers."""
    model, found = _explained((2, 4))
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    head = model.lm_head.weight.numel()

    def count(case: Case) -> ideal.Work:
        return ideal.work(case, found, model.config, torch.float32, head)

    whole = count(Case("prefill", 1, 10))
    assert whole.base == 2 * 10 * 8 * layer + 4 * 64 * 55 * 8 + 2 * head
    assert whole.share == 1.0
    out = count(Case("prefill", 1, 10, 1.0, 4))
    keys = found.exits[1].skipped_parameters
    assert 3 * layer < keys < 4 * layer
    assert out.base - out.executed == 2 * 10 * keys + 4 * 64 * 55 * 4
    ragged = count(Case("prefill", 2, 10, shortest=4))
    assert ragged.base - ragged.executed == 2 * 8 * layer * 6
    step = count(Case("decode", 2, 10))
    assert step.base == 4 * (8 * layer + head + 64 * 22 * 8)
    gone = count(Case("decode", 2, 10, 1.0, 4))
    assert gone.base - gone.executed == 4 * (keys + 64 * 22 * 4)
    half = count(Case("decode", 2, 10, 0.5, 4))
    assert half.base - half.executed == 4 * 64 * 11 * 4  # weights are read for the other row


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that slows down does not change them."""
    drift = [1.0 + 0.1 * at for at in range(20)]
    times = Times({"base": drift, "base again": drift, "exits": [0.5 * d for d in drift]})
    assert times.ratio("exits", ("base", "base again")) == pytest.approx(0.5)
    assert times.spread("base", "base again") == 0.0
    noisy = [d * (1.2 if at % 2 else 0.8) for at, d in enumerate(drift)]
    assert Times({"base": drift, "base again": noisy}).spread("base", "base again") > 0.05


class Fake:
    """Counts its calls."""

    device = CPU

    def __init__(self) -> None:
        self.prepared = self.called = 0

    def prepare(self) -> None:
        self.prepared += 1

    def call(self) -> None:
        self.called += 1


def test_arms_are_called_in_turn() -> None:
    arms: Any = {"a": Fake(), "b": Fake()}
    times = measure(arms, seconds=0.0, least=3)
    assert {name: len(found) for name, found in times.rounds.items()} == {"a": 3, "b": 3}
    assert arms["a"].called == arms["a"].prepared == 4


def test_bounds_hold_within_the_spread() -> None:
    assert row().efficiency == pytest.approx(0.8)
    assert row().kept is None
    assert row(bounds=[("ratio", 0.5)]).kept
    assert row(bounds=[("ratio", 0.496)]).kept
    assert row(bounds=[("ratio", 0.45)]).kept is False
    assert row(bounds=[("efficiency", 0.80)]).kept
    assert row(bounds=[("efficiency", 0.85)]).kept is False
    assert row(bounds=[("ratio", 0.1)], spread=0.06).kept is None
    assert row(bounds=[("ratio", 0.5), ("memory", 1.02)]).kept
    assert row(bounds=[("ratio", 0.5), ("memory", 1.005)]).kept is False
    assert row(bounds=[("ratio", 0.1), ("memory", 1.005)], spread=0.06).kept is False


class Slow(Fake):
    """Takes longer and longer."""

    def call(self) -> None:
        super().call()
        time.sleep(0.0005 * self.called)


def test_measuring_goes_on_until_equal_arms_agree() -> None:
    arms: Any = {"a": Slow(), "b": Fake()}
    longer = measure(arms, seconds=0.05, equal=("a", "b"), least=1)
    assert sum(longer.rounds["a"]) > 0.1
    arms = {"a": Fake(), "b": Fake()}
    assert len(measure(arms, seconds=0.0, least=3).rounds["a"]) == 3


class Takes:
    """Holds one tensor, and 3000 numbers more for a while."""

    device = CPU
    cache = None

    def __init__(self) -> None:
        self.model = torch.nn.Linear(10, 10)

    def prepare(self) -> None: ...

    def call(self) -> None:
        small = torch.zeros(1000)
        large = torch.zeros(2000)
        del small, large
        torch.zeros(1500)


def test_the_most_memory_is_that_of_the_model_and_of_the_highest_point() -> None:
    arm: Any = Takes()
    assert peak(arm) == 4 * (10 * 10 + 10 + 3000)
    view = torch.zeros(8)
    assert held_by([view[:2], view[2:]]) == 32


def test_noisy_rows_show_no_times() -> None:
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.table([row(), row(name="other", spread=0.2)], "title"))
    text = console.export_text()
    assert "1.00" in text
    assert "noisy" in text
    assert "20.0%" in text


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_configs(name: str) -> None:
    config: Any = config_of(name)
    assert config.hidden_size % config.num_attention_heads == 0
    assert config.num_attention_heads % config.num_key_value_heads == 0


@pytest.mark.parametrize(
    ("cache", "case"),
    [
        ("static", Case("prefill", 2, 12, shortest=6)),
        ("static", Case("decode", 2, 8, 1.0, 4)),
        ("dynamic", Case("decode", 2, 8)),
    ],
)
def test_a_case_runs_and_leaves_the_model_as_it_was(cache: str, case: Case) -> None:
    model = build("tiny", torch.float32, CPU)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    setting = Setting(exits=(2, 4), compiled=False, cache=cache, seconds=0.0)
    found = run_case(model, case, setting)
    assert found.ratio > 0
    assert (found.error is None) == bool(case.share)
    assert found.error is None or found.error < 1e-5
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    sizes = ["--batch", "1", "--prompt", "8", "--share", "0,1", "--seconds", "0"]
    command = ["bench", "--preset", "tiny", "--no-compile", "--phase", "decode", *sizes]
    assert cli.main([*command, "--dtype", "float32", "--json", str(file)]) == 0
    found = json.loads(file.read_text("utf-8"))
    assert [item["name"] for item in found["rows"]] == [
        "decode 1 x 8, threshold 1.0",
        "decode 1 x 8, 100% out at 4",
    ]
    assert found["exits"] == [2, 4, 6]
    assert found["threads"] == torch.get_num_threads()
    assert "decode 1 x 8" in capsys.readouterr().out


def test_what_the_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["bench", "--preset", "tiny", "--no-compile"]
    assert cli.main([*base, "--json", str(tmp_path / "no" / "x.json")]) == 2
    assert "cannot write" in capsys.readouterr().err
    monkeypatch.setattr(files, "find_spec", lambda _: None)
    assert cli.main([*base, "--plot", str(tmp_path / "x.png")]) == 2
    assert "matplotlib" in capsys.readouterr().err
    assert cli.main([*base, "--exit", "3"]) == 2
    assert "no exit point" in capsys.readouterr().err
