"""The command line of ``adept-fx explain``. Nothing heavy is imported before it runs."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adept_fx.errors import AdeptError, ConfigError
from adept_fx.files import require_writable

if TYPE_CHECKING:
    from adept_fx.config import ExitConfig

_EPILOG = """\
Exit status: 0 if transform takes the model, 1 if it refuses it, 2 if the command was wrong.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "explain",
        help="say what a model is rewritten into, or why it is refused",
        description="Says what transform makes of a model, or why it refuses it. Of a model_type, "
        "a tiny model with random weights is made; of a folder or repository, the config is read "
        "and no weights are loaded.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "subject", metavar="MODEL", help="a model_type, a folder, or a repository owner/name"
    )
    option = parser.add_argument
    option(
        "--exits",
        type=_exits,
        help="exit points such as 4,8 or every:4 (default: after every fourth layer, or in the "
        "middle of up to four)",
    )
    option("--gate", metavar="NAME", default="mlp", help="what decides (default: %(default)s)")
    option("--json", type=Path, metavar="FILE", help="write everything that was found there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Explains a model, prints it and writes the file; returns the exit status."""
    require_writable(options.json)
    from rich.console import Console

    from adept_fx.report.explain import explain

    model = _model(options.subject)
    explanation = explain(model, _config(model, options.exits, options.gate))
    if options.json:
        text = json.dumps(explanation.to_dict(), indent=1, ensure_ascii=False)
        options.json.write_text(text + "\n", "utf-8")
    Console().print(explanation)
    return 0 if explanation.accepted else 1


def _config(model: Any, exits: tuple[int, ...] | str | None, gate: str) -> "ExitConfig":
    from adept_fx.config import ExitConfig
    from adept_fx.inspect_model import find_decoder
    from adept_fx.model_facts import layer_count

    if exits is not None:
        return ExitConfig(exits=exits, gate=gate)
    config = ExitConfig(gate=gate)
    try:
        layers = layer_count(find_decoder(model))
    except AdeptError:
        return config  # the explanation says what is wrong
    return config if layers > 4 else ExitConfig(exits=(max(1, layers // 2),), gate=gate)


def _model(subject: str) -> Any:
    """A tiny model of a type, or one on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from adept_fx.check.model import build, is_model_type
    from adept_fx.check.selection import select

    select([subject])
    try:
        if is_model_type(subject):
            return build(subject)
        auto: Any = AutoModelForCausalLM
        config = AutoConfig.from_pretrained(subject)
        with torch.device("meta"):
            return auto.from_config(config).eval()
    except Exception as error:  # transformers, and the model's own code, raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"no causal language model of {subject!r} can be built: {reason}",
            hint="a folder or repository needs a config.json of such a model",
        ) from error


def _exits(text: str) -> tuple[int, ...] | str:
    if text.startswith("every:"):
        return text
    try:
        return tuple(int(item) for item in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 4,8 nor every:4") from None
