"""Files that commands write, and what they need for it."""

import os
from importlib.util import find_spec
from pathlib import Path

from adept_fx.errors import ConfigError


def require_writable(*files: Path | None) -> None:
    """Raises before a command's work is done, and not after half an hour of it.

    Args:
        files: Where the command is to write; None for what was not asked for.

    Raises:
        ConfigError: A file cannot be written.
    """
    for file in filter(None, files):
        place = file if file.exists() else file.parent
        if file.is_dir() or not file.parent.is_dir() or not os.access(place, os.W_OK):
            raise ConfigError(f"cannot write the file {file}", hint="does its folder exist?")


def require_matplotlib() -> None:
    """Says before anything is measured that it could not be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("a picture needs matplotlib", hint="pip install 'adept-fx[bench]'")
