"""What the files of saved exits are called, and which names of bases may be written into them."""

import os
import re

FORMAT = 1
"""Version of the files' format. One that is read differently gets the next number."""

CONFIG = "exit_config.json"
TENSORS = "exits.safetensors"
CARD = "README.md"

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)

# From a root, a drive or a home; not what follows the colon of a web address.
_PATH = re.compile(r"""(?:file:/|(?<![\w:/.-]))(?:[A-Za-z]:[\\/]|\\\\|~?/)[^\s"'<>|]*""")


def is_name(name: object) -> bool:
    """Whether it can be the name of a repository."""
    return isinstance(name, str) and bool(_REPOSITORY.fullmatch(name)) and ".." not in name


def public_name(name: object) -> str | None:
    """A name under which others find a model; None for local folders and what is no name.

    Args:
        name: A model's ``name_or_path``.
    """
    return name if isinstance(name, str) and is_name(name) and not os.path.exists(name) else None


def without_paths(value: object) -> object:
    """JSON types with only the last part of every absolute path in them."""
    if isinstance(value, dict):
        return {without_paths(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(item) for item in value]
    return _PATH.sub(_last_part, value) if isinstance(value, str) else value


def _last_part(match: re.Match[str]) -> str:
    return re.split(r"[\\/]", match[0].rstrip("\\/"))[-1]
