"""The command line: ``adept-fx COMMAND``.

A command is a function that adds its parser to the subparsers, and sets ``run`` to a function from
the parsed options to the exit status. It imports what is heavy in ``run`` alone.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TypeAlias

import adept_fx
from adept_fx.bench import command as bench
from adept_fx.check import command as check
from adept_fx.errors import AdeptError
from adept_fx.report import command as explain
from adept_fx.scanning import command as scan

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

COMMANDS: tuple[Callable[[Commands], None], ...] = (
    check.add_parser,
    explain.add_parser,
    scan.add_parser,
    bench.add_parser,
)
"""Add a command here."""

_INTERRUPTED = 130  # What shells report of a command that Ctrl-C ended.


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Those behind the program's name; the process's own if None.

    Returns:
        The exit status: the command's; 2 if it was wrong or refused, 130 if Ctrl-C ended it.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except AdeptError as error:
        print(f"adept-fx: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("adept-fx: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="adept-fx", description=adept_fx.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"adept-fx {adept_fx.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    return parser
