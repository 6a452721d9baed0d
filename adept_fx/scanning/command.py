"""The command line of ``adept-fx scan``. Nothing heavy is imported before it runs."""

import argparse
import json
from pathlib import Path
from typing import Any

from adept_fx.errors import ConfigError
from adept_fx.files import require_matplotlib, require_writable

_EPILOG = """\
Every token of the texts is asked, after each layer, what it would say if it left there, through the
model's own norm and head; that is compared with what it says in the end. Nothing is trained, the
model is not changed. What is saved is counted in token-layers, on the same tokens that chose the
exits: a first estimate, no promise.

Exit status: 0 if untrained exits pay, 1 if not, 2 if the command was wrong or the model is refused.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "scan",
        help="say, before any training, whether early exit is worth it for a model",
        description="Says whether early exit is worth it for a model, and proposes exit points.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("model", metavar="NAME_OR_PATH", help="a folder, or a repository owner/name")
    option("texts", metavar="FILE", nargs="+", type=Path, help="text as the model will see it")
    option("--exits", type=_numbers, metavar="4,8,12", help="default: all, at most 16")
    option("--tokens", type=int, default=8192, help="how many to look at (default: %(default)s)")
    option("--length", type=int, default=512, help="longest piece of text (default: %(default)s)")
    option("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    option("--device", default="cpu", help="default: %(default)s")
    option("--json", type=Path, metavar="FILE", help="write everything that was found there")
    option("--plot", type=Path, metavar="FILE", help="draw it (needs matplotlib)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Scans a model, prints the tables and writes the files; returns the exit status."""
    require_writable(options.json, options.plot)
    if options.plot:
        require_matplotlib()
    texts = [_read(file) for file in options.texts]
    from rich.console import Console

    from adept_fx.scanning import report
    from adept_fx.scanning.measure import scan

    model, tokenizer = _load(options)
    ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    found = scan(model, ids, exits=options.exits, tokens=options.tokens, length=options.length)
    console = Console()
    for part in report.tables(found):
        console.print(part, highlight=False)
    if options.json:
        content = json.dumps({"model": options.model, **found.to_dict()}, indent=1)
        options.json.write_text(content + "\n", "utf-8")
    if options.plot:
        report.plot(options.plot, found, str(options.model))
    return 0 if found.pays else 1


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}", hint="give files of text") from error


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    tokenizers: Any = AutoTokenizer
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        tokenizer = tokenizers.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"cannot load {options.model!r}: {reason}",
            hint="give a folder or repository with a causal language model and its tokenizer",
        ) from error
    return model.to(options.device).eval(), tokenizer


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(item) for item in text.split(","))
