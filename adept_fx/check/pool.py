"""Runs subjects in processes of their own, with limits on memory and time.

The processes are forked from a fork server that has torch and transformers loaded, so each is
ready at once and starts from the same state. What happens to one, be it a crash, a hang or memory
that runs out, becomes its result and touches no other.
"""

import multiprocessing
import os
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from adept_fx.check import child
from adept_fx.check.child import Job, Limits, Work
from adept_fx.check.result import CheckResult
from adept_fx.check.running import Running
from adept_fx.errors import AdeptError, ConfigError

if TYPE_CHECKING:  # Not on every platform.
    from multiprocessing.context import ForkServerContext, ForkServerProcess

PRELOADED = ("torch", "transformers", "adept_fx.check.child", "adept_fx.check.subject")
"""Modules that the fork server has loaded when it forks."""


def run(
    subjects: Iterable[str],
    work: Work = child.check_subject,
    *,
    jobs: int | None = None,
    limits: Limits | None = None,
    logs: Path | None = None,
    started: Callable[[str], object] = lambda subject: None,
) -> Generator[CheckResult, None, None]:
    """Does the work for each subject in a process of its own; yields results as they come.

    Closing the generator, or an exception in it such as ``KeyboardInterrupt``, kills what runs.

    Args:
        subjects: What to check; no two alike.
        work: A function of a module that takes a subject.
        jobs: Number of processes at a time; the number of CPUs if None.
        limits: What each may use.
        logs: A folder that keeps each subject's output, with a traceback of what failed, crashed
            or hung; thrown away if None.
        started: Called with each subject as its process starts.

    Raises:
        ConfigError: The platform has no fork server.
        AdeptError: The fork server died.
    """
    waiting = deque(subjects)
    jobs = min(jobs or cpus(), max(len(waiting), 1))
    context = _context()
    running: list[Running] = []
    with _folder(logs) as folder:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    subject = waiting.popleft()
                    log = folder / f"{quote(subject, safe='')[-200:]}.log"
                    threads = max(1, cpus() // jobs)
                    job = Job(work, subject, limits or Limits(), threads, log)
                    running.append(_start(context, job))
                    started(subject)
                _wait(running)
                for process in [process for process in running if process.ended()]:
                    running.remove(process)
                    yield process.outcome()
        finally:
            for process in running:
                process.kill()


def cpus() -> int:
    """Number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start(context: "ForkServerContext", job: Job) -> Running:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child.run, args=(job, sender), daemon=True)
    try:
        _fork(process)
    finally:
        sender.close()
    began = time.monotonic()
    return Running(job, process, receiver, began, began + job.limits.seconds)


def _fork(process: "ForkServerProcess") -> None:
    try:
        process.start()
    except (EOFError, OSError) as error:
        hint = f"see what `import {', '.join(PRELOADED)}` says"
        raise AdeptError("the fork server died", hint=hint) from error


def _wait(running: list[Running]) -> None:
    """Until a process answers, ends, or has used up its time."""
    events: list[Connection | int] = [each.process.sentinel for each in running]
    events += [each.answer for each in running if not each.answer.closed]
    first = min(each.deadline for each in running)
    wait(events, max(0.0, first - time.monotonic()))


def _context() -> "ForkServerContext":
    if "forkserver" not in multiprocessing.get_all_start_methods():
        raise ConfigError(
            "checks run in forked processes, which this platform does not have",
            hint="use Linux, or WSL",
        )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    # While it loads, Ctrl-C would end the server, and with a traceback. It inherits the mask, which
    # starting the resource tracker would undo.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    # The first process waits until all is loaded. If that is cut short, it still comes to be, and
    # should then do nothing.
    first = context.Process(target=child.nothing, daemon=True)
    _fork(first)
    first.join()
    return context


@contextmanager
def _folder(logs: Path | None) -> Iterator[Path]:
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
    with nullcontext(logs) if logs is not None else tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
