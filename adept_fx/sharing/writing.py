"""``adept_fx.save``."""

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adept_fx.errors import ConfigError
from adept_fx.runtime.handle import handle
from adept_fx.sharing.base import Base
from adept_fx.sharing.card import card, is_ours
from adept_fx.sharing.names import CARD, CONFIG, TENSORS
from adept_fx.sharing.record import clean, current_config, to_text
from adept_fx.sharing.tensors import own_tensors, to_bytes


@dataclass(frozen=True)
class Files:
    """The files' contents, so that all that can be wrong shows before one is written."""

    tensors: bytes
    card: str
    config: str

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Writes them, the config last: it names the tensors by their hash.

        Raises:
            ConfigError: The folder cannot be written.
        """
        place = Path(folder)
        contents = {TENSORS: self.tensors, CARD: self.card.encode(), CONFIG: self.config.encode()}
        try:
            place.mkdir(parents=True, exist_ok=True)
            if not is_ours(place):
                del contents[CARD]
            _replace(place, contents)
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise ConfigError(f"cannot write exits into {place}: {why}") from error


def save(ee: Any, folder: str | os.PathLike[str]) -> None:
    """Saves the exits of a rewritten model, without the model.

    Writes ``exit_config.json`` (exits, gates, present thresholds, calibration, and by what the base
    is known again), ``exits.safetensors`` (the handle's parameters) and ``README.md``, a model card
    for the Hub; a card that was not written by this library is kept. Nothing is pickled. Files of
    an earlier save are replaced one by one, each as a whole; :func:`adept_fx.load` refuses a
    mixture.

    Args:
        ee: What :func:`adept_fx.transform` or :func:`adept_fx.load` gave.
        folder: Where to; made if it is not there.

    Raises:
        ConfigError: A gate is of your own class, a parameter is no plain finite tensor, or the
            folder cannot be written. What was there before is as it was then.
        UnsupportedModelError: ``ee`` was not transformed.
    """
    files_of(ee).write(folder)


def files_of(
    ee: Any,
    state: Mapping[str, Any] | None = None,
    *,
    with_base: bool = False,
    place: str | None = None,
) -> Files:
    """The files' contents.

    Args:
        ee: A rewritten model.
        state: Values to save instead of the handle's own, named as in its state dict.
        with_base: Whether the base is saved in the same place.
        place: The repository that they will be in, if known.

    Raises:
        ConfigError: Something cannot be saved.
        UnsupportedModelError: ``ee`` was not transformed.
    """
    adept = handle(ee)
    config = current_config(adept)
    base = Base.of(ee, adept.decoder)
    tensors = to_bytes(own_tensors(adept, state))
    promise = clean(adept.calibration)
    text = to_text(config, promise, base, tensors)
    shown = card(config, promise, base, with_base=with_base, place=place)
    return Files(tensors, shown, text)


def _replace(folder: Path, contents: dict[str, bytes]) -> None:
    """Writes all under other names first: a full disk leaves the old files alone."""
    new = {name: folder / f".{name}.{secrets.token_hex(8)}" for name in contents}
    try:
        for name, file in new.items():
            with file.open("xb") as stream:
                stream.write(contents[name])
                stream.flush()
                os.fsync(stream.fileno())
        for name, file in new.items():
            file.replace(folder / name)
    finally:
        for file in new.values():
            file.unlink(missing_ok=True)
