"""Whatever a process does, its subject has a result and the others go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pool_workers as workers
from adept_fx.check import pool, running
from adept_fx.check.child import Limits

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(memory=4.0, seconds=60.0)


def outcomes(subjects: list[str], work: Any = workers.succeed, **options: Any) -> dict[str, Any]:
    found = list(pool.run(subjects, work, **{"limits": LIMITS, **options}))
    assert len(found) == len(subjects)
    return {result.subject: result for result in found}


def alive(process: int) -> bool:
    """A zombie is not: it only waits for somebody to ask how it ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Not an assertion about time: only a bound for a test that would hang."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_each_subject_has_a_process_of_its_own() -> None:
    begun: list[str] = []
    found = outcomes(["a", "b", "c"], jobs=2, started=begun.append)
    assert begun == ["a", "b", "c"]
    processes = {result.facts["process"] for result in found.values()}
    assert len(processes) == 3
    assert os.getpid() not in processes
    threads = max(result.facts["threads"] for result in found.values())
    assert threads <= max(1, pool.cpus() // 2)


def test_nothing_to_do() -> None:
    assert outcomes([]) == {}


@pytest.mark.parametrize("jobs", [1, 3])
def test_no_more_than_so_many_at_a_time(jobs: int, tmp_path: Path) -> None:
    subjects = [str(tmp_path / str(number)) for number in range(5)]
    found = outcomes(subjects, workers.count_neighbours, jobs=jobs)
    assert max(result.facts["beside"] for result in found.values()) <= jobs


REASONS = {
    "raises": "raised ValueError: no luck with this",
    "leaves": "raised SystemExit: 0",
    "segfault": "crashed with SIGSEGV",
    "exits": "exited with status 3 without a result",
    "allocate_in_python": "out of memory (limit 4 GiB): MemoryError",
    "allocate_in_torch": "out of memory (limit 4 GiB): RuntimeError: ",
    "allocate_and_hide_it": "out of memory (limit 4 GiB): ",
    "abort_without_memory": "out of memory (limit 4 GiB): crashed with SIGABRT",
    "cannot_be_sent": "raised TypeError: Object of type object is not JSON serializable",
    "returns_none": "raised AttributeError: ",
}


def test_every_bad_end_is_a_failed_result_and_others_go_on() -> None:
    good = ["reserve", "says_much"]
    found = outcomes([*REASONS, *good], workers.fail_as_asked)
    assert {name: found[name].status for name in good} == dict.fromkeys(good, "passed")
    for name, reason in REASONS.items():
        assert found[name].status == "failed", name
        assert found[name].reason.startswith(reason), found[name].reason
        assert "\n" not in found[name].reason


def test_a_hang_is_killed_and_its_log_says_where(tmp_path: Path) -> None:
    limits = Limits(memory=4.0, seconds=4.0)
    found = outcomes(["hang", "reserve"], workers.fail_as_asked, limits=limits, logs=tmp_path)
    assert found["hang"].status == "failed"
    assert found["hang"].reason == "ran longer than 4 s and was killed"
    assert found["reserve"].status == "passed"
    assert "in hang" in (tmp_path / "hang.log").read_text("utf-8")


def test_a_process_that_ignores_the_request_to_end_is_killed_with_all_it_started(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(running, "_ABORTING", 0.2)
    file = tmp_path / "processes"
    limits = Limits(memory=4.0, seconds=4.0)
    found = outcomes([str(file)], workers.hang_with_a_child, limits=limits)
    assert found[str(file)].reason == "ran longer than 4 s and was killed"
    processes = map(int, file.read_text("utf-8").split())
    wait_until(lambda: not any(map(alive, processes)))


def test_what_it_prints_goes_to_its_log(tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / "new" / "logs"
    outcomes(["a/b"], workers.prints, logs=folder)
    text = (folder / "a%2Fb.log").read_text("utf-8")
    assert sorted(text.splitlines()) == ["a/b to stderr", "a/b to stdout", "from native code"]
    assert "a/b" not in "".join(capfd.readouterr())


def test_a_failure_leaves_its_traceback(tmp_path: Path) -> None:
    outcomes(["raises"], workers.fail_as_asked, logs=tmp_path)
    text = (tmp_path / "raises.log").read_text("utf-8")
    assert "Traceback" in text
    assert "in raises" in text


def test_an_answer_counts_even_if_the_process_does_not_end(monkeypatch: Any) -> None:
    monkeypatch.setattr(running, "_ENDING", 0.2)
    assert outcomes(["a"], workers.answers_and_stays)["a"].status == "passed"


def test_a_memory_limit_above_the_need_is_not_felt() -> None:
    assert outcomes(["a"], limits=Limits(memory=1e6, seconds=60.0))["a"].status == "passed"


def test_closing_kills_what_runs(tmp_path: Path) -> None:
    file = tmp_path / "processes"
    results = pool.run([str(file), "quick"], workers.hang_with_a_child, jobs=2, limits=LIMITS)
    assert next(results).subject == "quick"
    wait_until(file.exists)
    processes = list(map(int, file.read_text("utf-8").split()))
    assert all(map(alive, processes))
    results.close()
    wait_until(lambda: not any(map(alive, processes)))


SCRIPT = """
import functools, sys
import pool_workers
from adept_fx import cli
from adept_fx.check import pool

if __name__ == "__main__":
    pool.PRELOADED = (sys.argv[1],)
    pool.run = functools.partial(pool.run, work=pool_workers.hang_with_a_child)
    sys.exit(cli.main(["check", sys.argv[2], "--json", sys.argv[3]]))
"""
SLOW = "import pathlib, time; pathlib.Path(__file__).with_name('loading').touch(); time.sleep(2)"


def start_command(folder: Path, preloaded: str) -> subprocess.Popen[str]:
    """`adept-fx check`, with a work that hangs; it leads a process group, as in a terminal."""
    (folder / "script.py").write_text(SCRIPT, "utf-8")
    (folder / "slow.py").write_text(SLOW, "utf-8")
    path = os.pathsep.join(map(str, [ROOT, ROOT / "tests", folder]))
    files = [str(folder / "processes"), str(folder / "results.json")]
    return subprocess.Popen(
        [sys.executable, str(folder / "script.py"), preloaded, *files],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A run in the background ignores the interrupt, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize(("preloaded", "sign"), [("torch", "processes"), ("slow", "loading")])
def test_ctrl_c_ends_cleanly(preloaded: str, sign: str, tmp_path: Path) -> None:
    """While a subject runs, and while the fork server loads."""
    command, file = start_command(tmp_path, preloaded), tmp_path / "processes"
    wait_until(lambda: (tmp_path / sign).exists() or command.poll() is not None)
    os.killpg(command.pid, signal.SIGINT)
    output, errors = command.communicate(timeout=120)
    assert command.returncode == 130
    assert "adept-fx: interrupted" in errors
    assert "Traceback" not in errors
    assert output == ""
    assert not (tmp_path / "results.json").exists()
    processes = list(map(int, file.read_text("utf-8").split())) if file.exists() else []
    assert bool(processes) == (sign == "processes")
    wait_until(lambda: not any(map(alive, processes)))


def test_nothing_outlives_a_killed_command(tmp_path: Path) -> None:
    command, file = start_command(tmp_path, "torch"), tmp_path / "processes"
    wait_until(lambda: file.exists() or command.poll() is not None)
    processes = list(map(int, file.read_text("utf-8").split()))
    command.kill()
    command.communicate(timeout=120)
    wait_until(lambda: not any(map(alive, processes)))


BROKEN = """
import pool_workers
from adept_fx.check import pool
from adept_fx.errors import AdeptError

if __name__ == "__main__":
    pool.PRELOADED = ("broken",)
    try:
        list(pool.run(["a"], pool_workers.succeed))
    except AdeptError as error:
        print(error)
"""


def test_a_fork_server_that_dies_is_told(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise ValueError('broken')", "utf-8")
    script = tmp_path / "script.py"
    script.write_text(BROKEN, "utf-8")
    path = os.pathsep.join(map(str, [ROOT, ROOT / "tests", tmp_path]))
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "the fork server died",
        "Way out: see what `import broken` says",
    ]
    assert "ValueError: broken" in done.stderr
