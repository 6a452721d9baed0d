"""The graphs captured of one model, and which of them fits it as it is now."""

import threading
from collections.abc import Hashable
from dataclasses import dataclass

from adept_fx.pipeline import Program
from adept_fx.runtime.fingerprint import Fingerprint

# Modes, adapters and forms of call that a model may switch between without a new capture.
_KEPT = 8


@dataclass(frozen=True)
class _Kept:
    form: Hashable
    program: Program
    seen: Fingerprint


class Programs:
    """Captured programs, the one used last first.

    A mode or an adapter that is switched back finds its program again. Programs that look into
    replaced modules or tensors are dropped: they would keep their memory.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: list[_Kept] = []

    @property
    def last(self) -> Program | None:
        """The program used last; None if there is none."""
        return self._kept[0].program if self._kept else None

    @property
    def fit(self) -> bool:
        """Whether all programs were captured of the model as it is now."""
        return all(item.seen.matches() for item in self._kept)

    def only_fitting(self) -> list[Program]:
        """Drops programs that were captured of the model as it is not now; returns the others."""
        with self._lock:
            self._kept = [item for item in self._kept if item.seen.matches()]
            return [item.program for item in self._kept]

    def find(self, form: Hashable) -> Program | None:
        """The program for calls of that form, if the model is one that was captured."""
        for at, item in enumerate(self._kept):
            if item.form == form and item.seen.matches():
                if at:
                    self._put_first(item)
                return item.program
        return None

    def add(self, form: Hashable, program: Program, seen: Fingerprint) -> None:
        """Keeps a program, with what its capture saw of the model."""
        self._put_first(_Kept(form, program, seen))

    def _put_first(self, first: _Kept) -> None:
        with self._lock:
            others = [item for item in self._kept if item is not first and item.seen.alive()]
            self._kept = [first, *others[: _KEPT - 1]]

    def clear(self) -> None:
        """Drops all of them."""
        with self._lock:
            self._kept = []
