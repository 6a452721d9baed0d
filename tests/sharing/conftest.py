"""Saved exits that tests may spoil."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import adept_fx
from shared_exits import made


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exits")
    adept_fx.save(made("mlp")[1], folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"
