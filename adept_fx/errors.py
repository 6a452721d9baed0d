"""The errors of ADEPT-FX.

Every one derives from `AdeptError` and says what was refused, why, and the way out. Those caused by
what the caller passed are also a `ValueError`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "AdeptError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "GateError",
    "InputError",
    "PassError",
    "StaleGraphError",
    "UnsupportedModelError",
]


class AdeptError(Exception):
    """Base of all errors that ADEPT-FX raises on purpose.

    Attributes:
        message: What is wrong and why, naming the layer or the argument.
        hint: The way out, or None.
        step: At which step of ``transform`` it was raised; None elsewhere.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        """Makes the error.

        Args:
            message: What is wrong and why, naming the layer or the argument.
            hint: What the caller can do about it.
        """
        # Only the positional argument goes into `args`: pickle and copy call `cls(*args)` and then
        # restore the rest from `__dict__`.
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.step: str | None = None

    def __str__(self) -> str:
        """Returns the message and, on a line of its own, the way out."""
        if self.hint is None:
            return self.message
        return f"{self.message}\nWay out: {self.hint}"


@contextmanager
def during(step: str) -> Iterator[None]:
    """Notes the step on errors that leave the context without one."""
    try:
        yield
    except AdeptError as error:
        error.step = error.step or step
        raise


class ConfigError(AdeptError, ValueError):
    """An `ExitConfig`, a threshold or another argument of the library is invalid."""


class UnsupportedModelError(AdeptError, ValueError):
    """`transform` refuses the model."""


class CaptureError(AdeptError):
    """`torch.export` could not capture the decoder."""


class CheckpointError(AdeptError, ValueError):
    """Saved exits cannot be read, or were made for another base."""


class PassError(AdeptError):
    """A condition that a graph pass or a verifier states does not hold."""


class GateError(AdeptError):
    """A gate returned, or was given, something that it must not."""


class InputError(AdeptError, ValueError):
    """Arguments of a model call that cannot be served while exits are on."""


class StaleGraphError(AdeptError):
    """The modules changed under a compiled graph."""
