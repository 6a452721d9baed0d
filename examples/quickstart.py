"""Early exits, seen: how deep does each token of a generated text have to go?

Without arguments this trains a small Llama on the Python standard library (once; it is kept in the
user's cache directory), rewrites it with `adept_fx.transform`, generates code, and prints every
token coloured by the number of layers that it took, the work saved, what it costs in quality, and
seconds against the original model. With `--model` it does the same to any other model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor

import adept_fx
from _measure import DepthRecorder, generate, measure_quality, median_seconds, same_prefix
from _show import pieces, print_exits, print_legend, print_quality, print_seconds, print_text
from _stdlib_lm import Settings, load_or_train, stdlib_texts
from _train import train
from adept_fx import AdeptError, ExitConfig

PROMPTS = (
    'class Reader:\n    """Read lines from a file."""\n\n    def __init__(self, file):\n',
    "def main():\n    import sys\n",
    "import unittest\n\nclass TestCase(unittest.TestCase):\n",
    "    def close(self):\n",
)


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, Any]:
    """Reads and checks the command line."""
    summary = "Shows how many layers each token of a generated text takes."
    parser = argparse.ArgumentParser(description=summary)
    add = parser.add_argument
    add("--model", metavar="NAME_OR_PATH", help="any causal language model; default: train one")
    add("--exits", type=exit_points, metavar="3,5", help="exit points, in layers; or every:N")
    add(
        "--threshold", type=fraction, help="leave above this probability (0.9; 0.3 if trained here)"
    )
    add("--batch", type=positive, default=1, help="number of prompts generated from at once (1)")
    add("--prompt", help="text to go on from, for all rows; default: openings of Python code")
    add("--tokens", type=positive, default=96, help="tokens to generate per row (96)")
    add("--repeat", type=positive, default=5, help="repetitions of each timing (5)")
    options = parser.parse_args(arguments)
    if options.prompt == "":
        parser.error("argument --prompt: must not be empty")
    return parser, options


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def fraction(text: str) -> float:
    """A number between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def exit_points(text: str) -> tuple[int, ...] | str:
    """Whole numbers with commas between them, or `every:N`."""
    if text.startswith("every:"):
        return text
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not like '3,5' or 'every:4'")
    return tuple(int(part) for part in parts)


def check_exits(options: Any) -> None:
    """Refuses wrong exits before anything is trained."""
    config = ExitConfig(exits=options.exits)
    if not options.model:
        config.resolve(Settings().layers)


def load(options: Any, console: Console) -> tuple[Any, Any]:
    """The model and its tokenizer: the one asked for, or the small one trained here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.model:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(options.model)
    else:
        model, tokenizer, figures = load_or_train(
            Settings(), lambda fresh, ids, settings: train(fresh.to(device), ids, settings)
        )
        console.print(
            "a Llama of {layers} layers, trained on the standard library: loss {loss:.2f} after "
            "{tokens} tokens and {seconds:.0f} s\n".format(
                layers=model.config.num_hidden_layers, **figures
            ),
            highlight=False,
            soft_wrap=True,
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer


def default_exits(layers: int) -> tuple[int, ...]:
    """A quarter, half and three quarters of the way."""
    return tuple(sorted({e for e in (layers // 4, layers // 2, 3 * layers // 4) if e >= 1}))


def default_threshold(options: Any) -> float:
    """Lower for the model trained here: it learned to predict at every exit."""
    return 0.9 if options.model else 0.3


def held_out_ids(tokenizer: Any, device: torch.device, rows: int = 16, length: int = 128) -> Tensor:
    """Held-out text of the standard library, `[rows, length + 1]`."""
    encoded = tokenizer("\n".join(stdlib_texts(held_out=True)), add_special_tokens=False)
    pieces = torch.tensor(encoded.input_ids).unfold(0, length + 1, length + 1)
    return pieces[:: max(1, len(pieces) // rows)][:rows].to(device)


def show(model: Any, ee: Any, tokenizer: Any, options: Any, console: Console) -> None:
    """Generates, measures and prints."""
    prompts = [options.prompt or PROMPTS[i % len(PROMPTS)] for i in range(options.batch)]
    inputs = dict(tokenizer(prompts, return_tensors="pt", padding=True).to(model.device))
    inputs = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    layers = model.config.get_text_config().num_hidden_layers
    levels = (*ee.adept.config.exits, layers)
    recorder = DepthRecorder(ee.adept)
    ids = generate(ee, inputs, options.tokens, recorder)
    print_legend(console, levels)
    for prompt, row, depths in zip(prompts, ids.tolist(), recorder.depths.tolist(), strict=True):
        print_text(console, prompt, zip(pieces(tokenizer, row), depths, strict=True), levels)
    print_exits(console, ee.adept.stats, layers)
    same = same_prefix(ids, generate(model, inputs, options.tokens))
    console.print(
        f"tokens before a text parts from the original's: {same} of {options.tokens}",
        highlight=False,
    )
    print_quality(console, measure_quality(model, ee, held_out_ids(tokenizer, model.device)))
    runs = {
        "original": lambda: generate(model, inputs, options.tokens),
        "with exits": lambda: generate(ee, inputs, options.tokens),
        "exits off": lambda: without_exits(ee, inputs, options.tokens),
    }
    seconds = median_seconds(runs, model.device, options.repeat)
    print_seconds(console, seconds, options.tokens * options.batch)


def without_exits(ee: Any, inputs: dict[str, Tensor], tokens: int) -> Tensor:
    """What the rewritten model does when nothing may leave."""
    with ee.adept.disabled():
        return generate(ee, inputs, tokens)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the quickstart."""
    parser, options = parse_arguments(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console()
    try:
        if options.exits:
            check_exits(options)
        model, tokenizer = load(options, console)
        layers = model.config.get_text_config().num_hidden_layers
        exits = options.exits or default_exits(layers)
        threshold = (
            options.threshold if options.threshold is not None else default_threshold(options)
        )
        config = ExitConfig(exits=exits, gate="max_prob", threshold=threshold)
        ee = adept_fx.transform(model, config)
    except (AdeptError, OSError, ValueError) as error:
        parser.error(str(error))
    show(model, ee, tokenizer, options, console)


if __name__ == "__main__":
    main()
