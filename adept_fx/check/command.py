"""The command line of ``adept-fx check``. Nothing heavy is imported before it runs."""

import argparse
import math
import shlex
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from adept_fx.check.child import Limits
from adept_fx.errors import ConfigError
from adept_fx.files import require_writable

if TYPE_CHECKING:
    from adept_fx.check.result import CheckResult

_DEFAULT = Limits()
_EPILOG = """\
Each model runs in a process of its own. The memory limit counts private writable memory
(RLIMIT_DATA): what the process really holds, loaded libraries' own data included (about 0.4 GiB),
but neither shared libraries nor address space that allocators and drivers merely reserve, as
RLIMIT_AS would. It works on Linux; macOS ignores it.

Exit status: 0 if no model failed, 1 if one did, 2 if the command was wrong.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "check",
        help="check that models are rewritten correctly",
        description="Checks that models are rewritten correctly. Of a model_type, a tiny model "
        "with random weights is made.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "subjects",
        nargs="*",
        metavar="MODEL",
        help="a model_type, a folder, or a repository owner/name (default: every model_type of "
        "transformers with a causal language model)",
    )
    option = parser.add_argument
    option("--jobs", type=_count, metavar="N", help="processes at a time (default: number of CPUs)")
    memory, seconds = _DEFAULT.memory, _DEFAULT.seconds
    help_of = "most {} of a process (default: %(default)g)".format
    option("--memory", type=_amount, default=memory, metavar="GIB", help=help_of("memory"))
    option("--timeout", type=_amount, default=seconds, metavar="SECONDS", help=help_of("time"))
    option("--json", type=Path, metavar="FILE", help="write the results there")
    option("--markdown", type=Path, metavar="FILE", help="write a page about them there")
    option("--logs", type=Path, metavar="FOLDER", help="keep what each process printed there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the checks, prints a table and writes the files; returns the exit status."""
    _require_places(options)
    from rich.console import Console

    from adept_fx.check import report, selection

    limits = Limits(options.memory, options.timeout)
    results = _results(selection.select(options.subjects), limits, options)
    command = shlex.join(["adept-fx", "check", *options.subjects])
    found = report.Report.of(results, command, limits)
    if options.json:
        options.json.write_text(report.to_json(found), "utf-8")
    if options.markdown:
        options.markdown.write_text(report.to_markdown(found), "utf-8")
    Console().print(report.to_table(found))
    return 1 if found.counts["failed"] else 0


def _results(
    subjects: list[str], limits: Limits, options: argparse.Namespace
) -> list["CheckResult"]:
    from adept_fx.check import pool
    from adept_fx.check.progress import Bar

    with Bar(len(subjects)) as bar:
        each = pool.run(
            subjects, jobs=options.jobs, limits=limits, logs=options.logs, started=bar.started
        )
        with closing(each):
            return [bar.finished(result) for result in each]


def _require_places(options: argparse.Namespace) -> None:
    """Before the checks run, and not after half an hour of them."""
    require_writable(options.json, options.markdown)
    try:
        if options.logs:
            options.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {options.logs}: {error.strerror}") from error


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value
