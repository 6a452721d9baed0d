"""Generated text is up to date, and files keep to the rules that the project sets itself."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
from pathlib import Path

import pytest

from adept_fx.graph.base import Pass
from adept_fx.pipeline import PIPELINE
from adept_fx.report.pass_table import BEGIN, END, pass_table, updated

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "passes" / "README.md"
PASSES = sorted(path for path in (ROOT / "passes").glob("*.py") if path.name != "__init__.py")
LIBRARY = sorted({path.resolve() for path in (ROOT / "adept_fx").rglob("*.py")} | set(PASSES))
UPDATE = "ADEPT_FX_UPDATE"


def test_the_table_of_passes_is_up_to_date() -> None:
    text = README.read_text("utf-8")
    if os.environ.get(UPDATE):
        README.write_text(updated(text), "utf-8")
        return
    assert updated(text) == text, f"{README} is stale: run this test with {UPDATE}=1"


def test_the_table_has_every_pass_in_order() -> None:
    rows = pass_table().splitlines()[2:]
    assert len(rows) == len(PIPELINE)
    for row, step in zip(rows, PIPELINE, strict=True):
        _, _, name, needs, reaches, effect, _ = (cell.strip() for cell in row.split("|"))
        assert f"`{step.__module__.rpartition('.')[2]}`" in name
        assert (needs, reaches) == (step.needs.name, step.reaches.name)
        assert effect.endswith(".")


def test_a_stale_table_is_replaced() -> None:
    stale = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    new = updated(stale)
    assert new == f"before\n{BEGIN}\n{pass_table()}\n{END}\nafter\n"
    assert updated(new) == new
    with pytest.raises(ValueError, match="no <!-- begin"):
        updated("nothing")


def test_the_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 60


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 400


def _passes_in(path: Path) -> list[type[Pass]]:
    module = importlib.import_module(f"adept_fx.passes.{path.stem}")
    classes = [item for _, item in inspect.getmembers(module, inspect.isclass)]
    return [c for c in classes if issubclass(c, Pass) and c.__module__ == module.__name__]


@pytest.mark.parametrize("path", PASSES, ids=lambda path: path.stem)
def test_one_pass_in_each_file(path: Path) -> None:
    (step,) = _passes_in(path)
    assert step in PIPELINE
    assert step.__name__.lower() == path.stem.replace("_", "")


def test_the_pipeline_has_no_other_pass() -> None:
    assert sorted(step.__module__ for step in PIPELINE) == [
        f"adept_fx.passes.{path.stem}" for path in PASSES
    ]


@pytest.mark.parametrize("path", PASSES, ids=lambda path: path.stem)
def test_each_pass_has_its_specification_and_its_test(path: Path) -> None:
    (step,) = _passes_in(path)
    for word in ("Before", "After", "Guarantees:"):
        assert word in str(step.__doc__), f"{step.__name__} does not say {word}"
    assert "ensures" in vars(step)
    assert (ROOT / "tests" / "passes" / f"test_{path.stem}.py").is_file()


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_raises_and_does_not_assert(path: Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    assert not [node.lineno for node in nodes if isinstance(node, ast.Assert)]
