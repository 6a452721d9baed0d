"""The process of one subject: it limits itself, does the work, and sends one answer."""

import faulthandler
import json
import multiprocessing
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from adept_fx.check.result import CheckResult

Work = Callable[[str], CheckResult]
"""What is done with a subject. A child finds it by name: a function of a module, no lambda."""

_GIB = 2**30
_OUT_OF_MEMORY = re.compile(
    r"MemoryError|bad_alloc|can't allocate memory|cannot allocate memory|"
    r"not enough memory|can't start new thread",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Limits:
    """What one subject may use.

    Attributes:
        memory: GiB of private writable memory, that of the loaded libraries included.
        seconds: Wall-clock time.
    """

    memory: float = 8.0
    seconds: float = 600.0


@dataclass(frozen=True)
class Job:
    """What a child is told.

    Attributes:
        work: What to do.
        subject: With what.
        limits: What it may use.
        threads: How many torch may use for one operation, unless it is told to use fewer.
        log: Where everything goes that is written to stdout and stderr.
    """

    work: Work
    subject: str
    limits: Limits
    threads: int
    log: Path


def check_subject(subject: str) -> CheckResult:
    """The work of ``adept-fx check``."""
    from adept_fx.check.subject import check  # Only children need torch.

    return check(subject)


def nothing() -> None:
    """The work of a process that only shows that processes can be made."""


def run(job: Job, answer: Connection) -> None:
    """Does the work of this process and sends its result, as JSON.

    Whatever the work raises is a failed result. Nothing is sent if the process crashes.
    """
    os.setsid()  # Not of the terminal's group: Ctrl-C goes to the parent, which kills this group.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _redirect(job.log)
    _limit_memory(job.limits.memory)
    _limit_threads(job.threads)
    answer.send_bytes(_answer(job))


def blames_memory(text: str) -> bool:
    """Whether an error message or a log tells of memory that could not be had."""
    return _OUT_OF_MEMORY.search(text) is not None


def out_of_memory(limits: Limits, detail: str) -> str:
    """The reason of a subject that ran over its memory limit."""
    return one_line(f"out of memory (limit {limits.memory:g} GiB): {detail}")


def one_line(text: str, length: int = 400) -> str:
    """The text without line breaks, and not longer than so many characters."""
    words = " ".join(text.split())
    return words if len(words) <= length else f"{words[: length - 4]} ..."


def _end_with_parent() -> None:
    """Ends this process and those that it started once nobody waits for its answer."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def _redirect(log: Path) -> None:
    """File descriptors and not ``sys.stderr`` alone: native code writes there too."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(target, descriptor)
    os.close(target)
    faulthandler.enable()  # Upon a crash, or the parent's SIGABRT, a traceback.


def _limit_memory(gib: float) -> None:
    """By ``RLIMIT_DATA`` and not ``RLIMIT_AS``: it counts what is private and writable.

    The address space also counts shared libraries and what allocators and CUDA drivers reserve
    and never touch, which is many times as much.
    """
    import resource  # Here, so that other platforms get as far as being told.

    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = int(gib * _GIB)
    allowed = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_threads(threads: int) -> None:
    """Keeps processes that run side by side from fighting for cores."""
    import torch

    torch.set_num_threads(min(threads, torch.get_num_threads()))


def _answer(job: Job) -> bytes:
    began = time.perf_counter()
    try:
        result = job.work(job.subject)
        if result.status != "passed" and blames_memory(result.reason):
            reason = out_of_memory(job.limits, result.reason)
            result = replace(result, status="failed", reason=reason)
        return json.dumps(result.to_dict()).encode()
    except BaseException as error:  # A SystemExit is no answer either.
        traceback.print_exc()
        text = "".join(traceback.format_exception_only(error))
        reason = out_of_memory(job.limits, text) if blames_memory(text) else f"raised {text}"
    seconds = time.perf_counter() - began
    failed = CheckResult(job.subject, "failed", one_line(reason), seconds=seconds)
    return json.dumps(failed.to_dict()).encode()
