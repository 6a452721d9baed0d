"""`adept-fx explain`: what it makes of its arguments, prints, writes and returns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adept_fx import cli
from adept_fx.report import explain as library
from adept_fx.report.explanation import Explanation
from adept_fx.report.facts import Refusal
from models import tiny, tiny_config

ROOT = Path(__file__).resolve().parent.parent


class Recorder:
    """Stands for `explain`: keeps what it was given."""

    def __init__(self, refusal: Refusal | None = None) -> None:
        self.refusal = refusal

    def __call__(self, model: Any, config: Any) -> Explanation:
        self.model, self.config = model, config
        return Explanation("Model", refusal=self.refusal)


@pytest.fixture
def fake(monkeypatch: Any) -> Any:
    def install(refusal: Refusal | None = None) -> Recorder:
        made = Recorder(refusal)
        monkeypatch.setattr(library, "explain", made)
        return made

    return install


def test_a_model_type(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "found.json"
    assert cli.main(["explain", "opt", "--gate", "cosine", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "OPTForCausalLM, accepted" in printed
    assert "gate cosine (reads previous)" in printed
    found = json.loads(file.read_text("utf-8"))
    assert found["accepted"] is True
    assert [item["after"] for item in found["exits"]] == [2]  # of four layers


def test_a_folder_needs_no_weights(tmp_path: Path, fake: Any) -> None:
    tiny_config("llama", layers=6).save_pretrained(tmp_path)
    made = fake()
    assert cli.main(["explain", str(tmp_path)]) == 0
    assert all(parameter.is_meta for parameter in made.model.parameters())
    assert type(made.model) is type(tiny("llama", layers=2))
    assert (made.config.exits, made.config.gate) == ("every:4", "mlp")
    assert cli.main(["explain", str(tmp_path), "--exits", "1,5", "--gate", "max_prob"]) == 0
    assert (made.config.exits, made.config.gate) == ((1, 5), "max_prob")
    assert cli.main(["explain", str(tmp_path), "--exits", "every:2"]) == 0
    assert made.config.exits == "every:2"


def test_a_refused_model_is_the_exit_status(tmp_path: Path, fake: Any, capsys: Any) -> None:
    tiny_config("llama", layers=2).save_pretrained(tmp_path)
    fake(Refusal("capture", "CaptureError", "it cannot be traced", "use another"))
    assert cli.main(["explain", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "it cannot be traced" in printed
    assert "use another" in printed


@pytest.mark.parametrize("exits", ["4,3", "0", "every:0"])
def test_a_config_that_is_none(exits: str, tmp_path: Path, capsys: Any) -> None:
    tiny_config("llama", layers=2).save_pretrained(tmp_path)
    assert cli.main(["explain", str(tmp_path), "--exits", exits]) == 2
    assert "exits" in capsys.readouterr().err


def test_what_is_no_model(tmp_path: Path, fake: Any, capsys: Any) -> None:
    made = fake()
    assert cli.main(["explain", "lama"]) == 2
    assert "close to it: llama" in capsys.readouterr().err
    assert cli.main(["explain", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
    assert not hasattr(made, "model")


def test_a_file_that_cannot_be_written_is_refused_first(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "none" / "found.json"
    assert cli.main(["explain", "lama", "--json", str(file)]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["gpt2", "--exits", "x"], ["gpt2", "--gate"]])
def test_bad_usage(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["explain", *arguments])
    assert error.value.code == 2
    assert "usage: adept-fx explain" in capsys.readouterr().err


def test_parsing_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from adept_fx import cli\n"
        "try:\n"
        "    cli.main(['explain', '--help'])\n"
        "except SystemExit:\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'rich'} & sys.modules.keys()\n"
        "    sys.exit(str(heavy) if heavy else 0)\n"
        "sys.exit('went on')\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
