"""What is installed is what the repository holds; set-up commands are the documented ones."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("adept_fx", "passes")
FILES = ("pyproject.toml", "README.md", "LICENSE")


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )


def clean_copy(target: Path) -> Path:
    """A copy without what earlier builds left behind, as a fresh clone would be."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, symlinks=True, ignore=ignore)
    for file in FILES:
        shutil.copy2(ROOT / file, target / file)
    return target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    pytest.importorskip("setuptools")
    source = clean_copy(tmp_path_factory.mktemp("source"))
    out = tmp_path_factory.mktemp("wheel")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "-w", str(out), str(source)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return zipfile.Path(built)


def sources(folder: str) -> set[str]:
    prefix = "" if folder == "adept_fx" else "adept_fx/"
    return {prefix + str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*.py")}


def test_wheel_holds_every_module_and_nothing_else(wheel: zipfile.Path) -> None:
    names = wheel.root.namelist()
    code = {n for n in names if ".dist-info/" not in n}
    assert {n for n in code if n.endswith(".py")} == sources("adept_fx") | sources("passes")
    assert "adept_fx/passes/__init__.py" in code
    assert "adept_fx/py.typed" in code
    assert all(n.startswith("adept_fx/") for n in code)


def test_wheel_has_the_version_and_the_licence(wheel: zipfile.Path) -> None:
    import adept_fx

    names = wheel.root.namelist()
    assert any(n.endswith("licenses/LICENSE") for n in names)
    (metadata,) = (n for n in names if n.endswith("/METADATA"))
    assert f"\nVersion: {adept_fx.__version__}\n" in wheel.root.read(metadata).decode()


def test_wheel_imports_from_elsewhere(wheel: zipfile.Path, tmp_path: Path) -> None:
    wheel.root.extractall(tmp_path)
    code = "import adept_fx.passes as p; print(p.__file__)"
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "adept_fx" / "passes" / "__init__.py"


def test_passes_is_a_relative_link() -> None:
    link = ROOT / "adept_fx" / "passes"
    assert link.is_symlink()
    assert link.readlink() == Path("../passes")


def test_importing_passes_at_top_level_is_refused() -> None:
    done = run_python("import passes", ROOT)
    assert done.returncode != 0
    assert "ImportError: import this package as 'adept_fx.passes'" in done.stderr


def test_root_is_lazy() -> None:
    done = run_python(
        "import sys, adept_fx; dir(adept_fx); adept_fx.__version__;"
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))",
        ROOT,
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there() -> None:
    import adept_fx

    assert set(adept_fx.__all__) <= set(dir(adept_fx))
    for name in adept_fx.__all__:
        assert getattr(adept_fx, name) is not None
    assert callable(adept_fx.transform)
    assert callable(adept_fx.restore)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = adept_fx.no_such_name


def test_readme_has_two_setup_commands_and_ci_runs_the_second() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    commands = re.findall(r"^python3 -m venv .*$", readme, flags=re.MULTILINE)
    assert len(commands) == 2
    quickstart, tests = commands
    assert quickstart.endswith("python examples/quickstart.py")
    assert tests.endswith("python -m pytest")
    assert tests in (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
