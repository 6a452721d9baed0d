"""What the tests of the pool do in child processes, which import this module by its name."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from adept_fx.check.result import CheckResult

FOREVER = 3600.0


def succeed(subject: str) -> CheckResult:
    facts = {"process": os.getpid(), "threads": torch.get_num_threads()}
    return CheckResult(subject, "passed", facts=facts)


def fail_as_asked(subject: str) -> CheckResult:
    """The subject says how, as the name of a function here."""
    result: CheckResult = globals()[subject](subject)
    return result


def raises(subject: str) -> CheckResult:
    raise ValueError("no luck\nwith this")


def leaves(subject: str) -> CheckResult:
    sys.exit(0)


def segfault(subject: str) -> CheckResult:
    ctypes.string_at(0)
    raise AssertionError


def exits(subject: str) -> CheckResult:
    os._exit(3)


def hang(subject: str) -> CheckResult:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(FOREVER)
    raise AssertionError


def allocate_in_python(subject: str) -> CheckResult:
    return CheckResult(subject, "passed", facts={"size": len(bytearray(1 << 40))})


def allocate_in_torch(subject: str) -> CheckResult:
    return CheckResult(subject, "passed", facts={"size": len(torch.ones(1 << 40))})


def allocate_and_hide_it(subject: str) -> CheckResult:
    try:
        return allocate_in_torch(subject)
    except RuntimeError as error:
        return CheckResult(subject, "unavailable", str(error))


def abort_without_memory(subject: str) -> CheckResult:
    """As a C++ allocation does that nobody catches."""
    os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
    os.abort()


def reserve(subject: str) -> CheckResult:
    """Address space alone, which cannot be written to."""
    with mmap.mmap(-1, 1 << 36, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as space:
        return CheckResult(subject, "passed", facts={"size": len(space)})


def cannot_be_sent(subject: str) -> CheckResult:
    return CheckResult(subject, "passed", facts={"what": object()})


def returns_none(subject: str) -> Any:
    return None


def says_much(subject: str) -> CheckResult:
    return CheckResult(subject, "passed", facts={"text": "x" * 3_000_000})


def prints(subject: str) -> CheckResult:
    print(f"{subject} to stdout")
    print(f"{subject} to stderr", file=sys.stderr)
    os.write(2, b"from native code\n")
    return CheckResult(subject, "passed")


def answers_and_stays(subject: str) -> CheckResult:
    threading.Thread(target=time.sleep, args=(FOREVER,)).start()
    return CheckResult(subject, "passed")


def count_neighbours(subject: str) -> CheckResult:
    """How many run at a time. The subject is a file of its own in a folder of all."""
    path = Path(subject)
    path.touch()
    time.sleep(0.3)
    beside = len(list(path.parent.iterdir()))
    path.unlink()
    return CheckResult(subject, "passed", facts={"beside": beside})


def hang_with_a_child(subject: str) -> CheckResult:
    """The subject is the file where it writes both process ids; one named "quick" is not."""
    if subject == "quick":
        return succeed(subject)
    child = subprocess.Popen(["sleep", str(FOREVER)])
    faulthandler.disable()
    signal.signal(signal.SIGABRT, signal.SIG_IGN)
    written = Path(subject).with_suffix(".part")
    written.write_text(f"{os.getpid()} {child.pid}", "utf-8")
    written.rename(subject)
    return hang(subject)
