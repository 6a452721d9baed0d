"""The command line: what is asked for, what is written where, and the exit status."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import adept_fx
from adept_fx import cli
from adept_fx.check import pool, selection
from adept_fx.check.child import Limits
from adept_fx.check.report import from_json, to_markdown
from adept_fx.check.result import CheckResult
from adept_fx.errors import AdeptError, ConfigError

ROOT = Path(__file__).resolve().parents[2]


class FakePool:
    """Stands for `pool.run`: gives the results it has been told to."""

    def __init__(self, **results: CheckResult | BaseException) -> None:
        self.results = results
        self.subjects: list[str] = []
        self.options: dict[str, Any] = {}

    def run(self, subjects: list[str], *, started: Any, **options: Any) -> Iterator[CheckResult]:
        self.subjects, self.options = subjects, options
        for subject in reversed(subjects):
            started(subject)
        for subject in subjects:
            result = self.results.get(subject, CheckResult(subject, "passed"))
            if isinstance(result, BaseException):
                raise result
            yield result


@pytest.fixture
def fake(monkeypatch: Any) -> Any:
    def install(**results: CheckResult | BaseException) -> FakePool:
        made = FakePool(**results)
        monkeypatch.setattr(pool, "run", made.run)
        return made

    return install


def test_all_pass(fake: Any, capsys: Any) -> None:
    fake()
    assert cli.main(["check", "llama", "gpt2"]) == 0
    output, errors = capsys.readouterr()
    assert "2 checked: 2 passed" in output
    assert "llama" in output
    assert "checked" not in errors


def test_refused_and_unavailable_are_no_failures(fake: Any) -> None:
    fake(
        gpt2=CheckResult("gpt2", "refused", "no"), opt=CheckResult("opt", "unavailable", "no more")
    )
    assert cli.main(["check", "llama", "gpt2", "opt"]) == 0


def test_a_failure_is_the_exit_status(fake: Any, capsys: Any) -> None:
    fake(gpt2=CheckResult("gpt2", "failed", "it broke"))
    assert cli.main(["check", "llama", "gpt2"]) == 1
    assert "it broke" in capsys.readouterr().out


def test_all_model_types_without_arguments(fake: Any) -> None:
    made = fake()
    assert cli.main(["check"]) == 0
    assert made.subjects == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert made.options == {"jobs": None, "limits": Limits(8.0, 600.0), "logs": None}


def test_options_reach_the_pool(fake: Any, tmp_path: Path) -> None:
    made = fake()
    options = ["--jobs", "3", "--memory", "2.5", "--timeout", "7", "--logs", str(tmp_path / "l")]
    assert cli.main(["check", "llama", *options]) == 0
    assert made.options == {"jobs": 3, "limits": Limits(2.5, 7.0), "logs": tmp_path / "l"}


def test_files_are_written(fake: Any, tmp_path: Path) -> None:
    fake(gpt2=CheckResult("gpt2", "failed", "it broke"))
    file, page = tmp_path / "m.json", tmp_path / "m.md"
    cli.main(["check", "llama", "gpt2", "--json", str(file), "--markdown", str(page)])
    report = from_json(file.read_text("utf-8"))
    assert [result.subject for result in report.results] == ["gpt2", "llama"]
    assert report.command == "adept-fx check llama gpt2"
    assert page.read_text("utf-8") == to_markdown(report)


def test_an_interrupt_ends_it_and_writes_nothing(fake: Any, tmp_path: Path, capsys: Any) -> None:
    fake(llama=KeyboardInterrupt())
    file = tmp_path / "m.json"
    assert cli.main(["check", "gpt2", "llama", "--json", str(file)]) == 130
    assert not file.exists()
    assert capsys.readouterr().err.endswith("adept-fx: interrupted\n")


def test_errors_are_told_without_a_traceback(fake: Any, capsys: Any) -> None:
    fake(llama=AdeptError("it is broken", hint="mend it"))
    assert cli.main(["check", "llama"]) == 2
    assert capsys.readouterr().err.endswith("adept-fx: it is broken\nWay out: mend it\n")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["chekc"],
        ["check", "--jobs", "0"],
        ["check", "--jobs", "1.5"],
        ["check", "--memory", "nan"],
        ["check", "--memory", "inf"],
        ["check", "--timeout", "-1"],
        ["check", "--timeout", "soon"],
        ["check", "--no-such-option"],
    ],
)
def test_bad_usage(arguments: list[str], fake: Any, capsys: Any) -> None:
    made = fake()
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert "usage: adept-fx" in capsys.readouterr().err
    assert made.subjects == []


@pytest.mark.parametrize("option", ["--json", "--markdown", "--logs"])
def test_a_place_that_cannot_be_written_is_refused_first(
    option: str, fake: Any, tmp_path: Path, capsys: Any
) -> None:
    made = fake()
    (tmp_path / "file").touch()
    assert cli.main(["check", "llama", option, str(tmp_path / "file" / "below")]) == 2
    assert "below" in capsys.readouterr().err
    assert made.subjects == []


def test_an_unknown_model_type_is_refused_with_close_ones(fake: Any, capsys: Any) -> None:
    made = fake()
    assert cli.main(["check", "gpt2", "lama"]) == 2
    message = capsys.readouterr().err
    assert "'lama' is no model type" in message
    assert "llama" in message.partition("close to it")[2]
    assert made.subjects == []


def test_subjects_are_sorted_and_each_is_once(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    found = selection.select(["llama", "owner/name", "gpt2", "llama", "here"])
    assert found == ["gpt2", "here", "llama", "owner/name"]


def test_nothing_is_close_to_nonsense() -> None:
    with pytest.raises(ConfigError, match="owner/name"):
        selection.select(["§§§"])


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_it_runs_as_a_module() -> None:
    done = run_python("-m", "adept_fx", "--version")
    assert done.stdout == f"adept-fx {adept_fx.__version__}\n"
    assert done.returncode == 0


@pytest.mark.parametrize("arguments", [["--help"], ["check", "--help"], ["check", "--jobs", "x"]])
def test_parsing_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import json, sys\n"
        "from adept_fx import cli\n"
        "try:\n"
        f"    cli.main({json.dumps(arguments)})\n"
        "except SystemExit:\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'rich'} & sys.modules.keys()\n"
        "    sys.exit(str(heavy) if heavy else 0)\n"
        "sys.exit('went on')\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_it_is_installed_as_a_program() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    module, _, function = project["scripts"]["adept-fx"].partition(":")
    assert getattr(importlib.import_module(module), function) is cli.main
