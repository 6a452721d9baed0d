"""``ee.save_pretrained``: the plain base, and the exits beside it."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

_PREFIX = "adept."


def save_pretrained(
    ee: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Any] | None = None,
    push_to_hub: bool = False,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Saves the base as a plain checkpoint, and what :func:`adept_fx.save` writes beside it.

    ``from_pretrained`` of the model's class loads the base from there, :func:`adept_fx.load` the
    exits.

    Args:
        ee: A rewritten model.
        save_directory: Where to.
        is_main_process: As in transformers.
        state_dict: As in transformers; what it says of the exits (``adept.*``) goes into theirs.
        push_to_hub: Upload the files, as in transformers: base and exits in one commit.
        args: More arguments of the class's own ``save_pretrained``.
        kwargs: The same by name.

    Raises:
        ConfigError: The exits cannot be saved. Nothing was written then.
    """
    from adept_fx.rewrite import original  # Here: `transform` binds this function.
    from adept_fx.sharing.writing import files_of

    own, base = _split(state_dict)
    files = files_of(ee, own, with_base=True) if is_main_process else None
    plain = original(ee)
    options = _for_the_hub(kwargs) if push_to_hub else {}
    folder = Path(save_directory)
    before = _times(folder)
    plain.save_pretrained(save_directory, is_main_process, base, False, *args, **kwargs)
    if files is None or not folder.is_dir():  # transformers only logs that the folder is a file
        return
    files.write(folder)
    if push_to_hub:
        from adept_fx.sharing.hub import upload

        changed = [name for name, time in _times(folder).items() if time != before.get(name)]
        upload(os.fspath(folder), sorted(changed), options)


def _split(
    state: Mapping[str, Any] | None,
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The exits' part of a state dict, without its prefix, and the rest."""
    if state is None:
        return None, None
    own = {
        name.removeprefix(_PREFIX): value
        for name, value in state.items()
        if name.startswith(_PREFIX)
    }
    rest = {name: value for name, value in state.items() if not name.startswith(_PREFIX)}
    return own, rest


def _for_the_hub(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes out what ``save_pretrained`` passes on to the upload; ``token`` is for both."""
    known = inspect.signature(PreTrainedModel.save_pretrained).parameters
    options = {name: kwargs.pop(name) for name in list(kwargs) if name not in known}
    if kwargs.get("token") is not None:
        options["token"] = kwargs["token"]
    return options


def _times(folder: Path) -> dict[str, int]:
    if not folder.is_dir():
        return {}
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir() if file.is_file()}
