"""The committed results of `adept-fx check` are those of this code."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import transformers

from adept_fx.check import pool
from adept_fx.check.reasons import reason_group
from adept_fx.check.report import Report, from_json, to_markdown
from adept_fx.check.result import STEPS, CheckResult
from adept_fx.check.selection import model_types

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "adept_fx" / "check"
ANEW = "run: adept-fx check --json adept_fx/check/matrix.json --markdown adept_fx/check/MATRIX.md"
PASSED_AT_LEAST = 120
SAMPLE = [
    *("llama", "qwen3", "gemma3_text", "gemma2", "gpt2", "gpt_neox", "bloom", "opt", "mixtral"),
    *("deepseek_v3", "falcon", "mpt", "bert", "bart", "cohere2", "phi", "gptj", "starcoder2"),
    *("granite", "mamba"),
]


@cache
def committed() -> Report:
    return from_json((FOLDER / "matrix.json").read_text("utf-8"))


def essence(result: CheckResult) -> tuple[str, str]:
    return result.status, reason_group(result.reason)


def same_transformers() -> None:
    noted = committed().versions["transformers"]
    if noted != transformers.__version__:
        pytest.skip(f"made with transformers {noted}, not {transformers.__version__}")


def test_it_was_made_with_the_versions_of_the_tests() -> None:
    pins = (ROOT / ".ci" / "constraints.txt").read_text("utf-8")
    for package, version in committed().versions.items():
        (pinned,) = re.findall(rf"^{package}==(\S+)$", pins, flags=re.MULTILINE)
        assert version.partition("+")[0] == pinned, ANEW


def test_it_has_every_model_type_once() -> None:
    same_transformers()
    assert [result.subject for result in committed().results] == model_types(), ANEW


def test_none_failed() -> None:
    bad = [result for result in committed().results if result.status == "failed"]
    assert [f"{result.subject}: {result.reason}" for result in bad] == []


def test_most_passed_every_step() -> None:
    passed = [result for result in committed().results if result.status == "passed"]
    assert len(passed) >= PASSED_AT_LEAST
    for result in passed:
        assert result.steps == dict.fromkeys(STEPS, "ok"), result.subject


def test_the_others_say_why() -> None:
    others = [result for result in committed().results if result.status != "passed"]
    assert [result.subject for result in others if not result.reason.strip()] == []


def test_the_page_is_made_from_the_json() -> None:
    assert (FOLDER / "MATRIX.md").read_text("utf-8") == to_markdown(committed()), ANEW


@pytest.mark.slow
def test_a_sample_has_the_committed_results() -> None:
    same_transformers()
    noted = {result.subject: essence(result) for result in committed().results}
    found = {result.subject: essence(result) for result in pool.run(SAMPLE)}
    assert found == {subject: noted[subject] for subject in SAMPLE}, ANEW
