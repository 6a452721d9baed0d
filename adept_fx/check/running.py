"""Watches the process of one subject, and tells how it ended."""

import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from adept_fx.check import child
from adept_fx.check.child import Job
from adept_fx.check.result import CheckResult

if TYPE_CHECKING:  # Not on every platform.
    from multiprocessing.context import ForkServerProcess

_ENDING = 5.0  # seconds that a process has to end after its answer
_ABORTING = 2.0  # and that one which overran has to write its traceback
_LOG_TAIL = 1 << 16  # bytes


@dataclass
class Running:
    """The process of a subject, as its parent sees it.

    Attributes:
        job: What it was told.
        process: The process.
        answer: Where its result comes from.
        began: When it started, by ``time.monotonic``.
        deadline: When it is to be ended, by the same clock.
        result: Its result, once that has come.
        overran: It was told to end because its time was over.
    """

    job: Job
    process: "ForkServerProcess"
    answer: Connection
    began: float
    deadline: float
    result: CheckResult | None = None
    overran: bool = False

    def ended(self) -> bool:
        """Takes the answer if there is one, and ends the process if its time is over."""
        exited = self.process.exitcode is not None  # First: it answers before it exits.
        if not self.answer.closed and self.answer.poll():
            self._receive()
        if not exited and time.monotonic() < self.deadline:
            return False
        if not exited and self.result is None and not self.overran:
            self._abort()
            return False
        self.kill()
        return True

    def _receive(self) -> None:
        try:
            self.result = CheckResult.from_dict(json.loads(self.answer.recv_bytes()))
            self.deadline = time.monotonic() + _ENDING
        except (EOFError, OSError):
            pass  # It ends without an answer, or in the middle of one: its exit status will tell.
        self.answer.close()

    def _abort(self) -> None:
        """Ends a process that overran, by the signal upon which it writes its traceback."""
        self.overran = True
        self.deadline = time.monotonic() + _ABORTING
        if self.process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGABRT)

    def kill(self) -> None:
        """Kills the process and those that it started, which may be left even if it is gone."""
        if self.process.pid is not None:
            with suppress(OSError):  # It leads no group yet, or none is left.
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.answer.close()

    def outcome(self) -> CheckResult:
        """What it answered, or why there is no answer."""
        if self.result is not None:
            return self.result
        seconds = time.monotonic() - self.began
        reason = child.one_line(self._why_no_answer())
        return CheckResult(self.job.subject, "failed", reason, seconds=seconds)

    def _why_no_answer(self) -> str:
        if self.overran:
            return f"ran longer than {self.job.limits.seconds:g} s and was killed"
        end = _ending(self.process.exitcode or 0)
        if child.blames_memory(_tail(self.job.log)):
            return child.out_of_memory(self.job.limits, end)
        return end


def _ending(code: int) -> str:
    if code >= 0:
        return f"exited with status {code} without a result"
    known = {number.value for number in signal.Signals}
    name = signal.Signals(-code).name if -code in known else f"signal {-code}"
    return f"crashed with {name}"


def _tail(log: Path) -> str:
    if not log.exists():
        return ""
    return log.read_bytes()[-_LOG_TAIL:].decode(errors="replace")
