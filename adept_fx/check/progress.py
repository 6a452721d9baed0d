"""The progress bar of ``adept-fx check``, on stderr."""

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from adept_fx.check.result import CheckResult


class Bar:
    """Shows how many subjects are done, how many of them failed, and which are running."""

    def __init__(self, total: int) -> None:
        self._running: list[str] = []
        self._failed = 0
        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def started(self, subject: str) -> None:
        """Shows the subject as running."""
        self._running.append(subject)
        self._show()

    def finished(self, result: CheckResult) -> CheckResult:
        """Counts the result, and hands it back."""
        self._running.remove(result.subject)
        self._failed += result.status == "failed"
        self._show(advance=1)
        return result

    def _show(self, advance: int = 0) -> None:
        failed = f"{self._failed} failed  " if self._failed else ""
        text = failed + ", ".join(self._running)
        self._progress.update(self._task, advance=advance, description=text)
