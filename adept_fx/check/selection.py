"""Which models to check."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from adept_fx.errors import ConfigError


def model_types() -> list[str]:
    """The ``model_type`` of every causal language model of the installed transformers, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def select(names: Iterable[str] = ()) -> list[str]:
    """The subjects that were asked for, each once and sorted; all model types if none were.

    Args:
        names: Model types, paths of folders, or repository names (``owner/name``).

    Raises:
        ConfigError: A name is none of these.
    """
    types = model_types()
    wanted = sorted(set(names))
    for name in wanted:
        if name not in types and "/" not in name and not Path(name).is_dir():
            raise _unknown(name, types)
    return wanted or types


def _unknown(name: str, types: list[str]) -> ConfigError:
    close = get_close_matches(name, types, n=3, cutoff=0.5)
    hint = f"close to it: {', '.join(close)}" if close else "a repository is named owner/name"
    return ConfigError(
        f"{name!r} is no model type with a causal language model, no folder and no repository",
        hint=hint,
    )
