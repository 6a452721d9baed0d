"""Which exit criterion saves most? Those of the literature, compared on one model.

Without arguments this takes the small Llama of the quickstart, or trains it; with `--model` any
other causal language model, whose weights stay as they are. Exit adapters are trained once and
shared. Every criterion then trains what it has to learn, is calibrated to the target agreement with
the whole model on one half of the held-out text, and is measured on the other half, in prompts that
run in one call.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

import adept_fx
from _criteria import REFERENCES, Budget, Comparison, Row
from _stdlib_lm import Settings, encode, load_or_train, stdlib_texts
from _train import train
from adept_fx import AdeptError, ExitConfig
from adept_fx.bench.report import hardware
from quickstart import default_exits, exit_points, positive


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, Any]:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(description="Compares exit criteria on one model.")
    add = parser.add_argument
    add("--model", metavar="NAME_OR_PATH", help="any causal language model; default: train one")
    add("--exits", type=exit_points, metavar="3,5", help="exit points, in layers; or every:N")
    add("--target", type=float, default=0.97, help="next-token agreement (0.97)")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--columns", type=positive, default=128, help="tokens of a text (128)")
    add("--texts", type=positive, default=480, help="held-out texts, for both halves (480)")
    add("--batch", type=positive, default=32, help="texts of a call (32)")
    add("--fit-steps", type=positive, default=200, help="training steps of each part (200)")
    add("--rank", type=positive, default=32, help="of the exit adapters (32)")
    add("--train-ids", type=Path, metavar="FILE.npy", help="to train on; default: Python code")
    add("--held-out-ids", type=Path, metavar="FILE.npy", help="to calibrate and measure on")
    options = parser.parse_args(arguments)
    if not 0 < options.target < 1:
        parser.error("argument --target: must be between 0 and 1")
    if options.columns < 8:
        parser.error("argument --columns: must be at least 8")
    return parser, options


def load(options: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The model, its tokenizer, and how it was trained."""
    if not options.model:
        return load_or_train(Settings(), train)
    # In float32: half precision makes ties of what the criteria have to tell apart.
    models: Any = transformers.AutoModelForCausalLM
    tokenizers: Any = transformers.AutoTokenizer
    model = models.from_pretrained(options.model, dtype=torch.float32)
    return model, tokenizers.from_pretrained(options.model), {}


def texts_of(tokenizer: Any, options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Texts to train on, to calibrate on and to test on, `[n, columns]` each, in random order."""
    parts = []
    for file, held_out in ((options.train_ids, False), (options.held_out_ids, True)):
        if file:
            ids = torch.from_numpy(numpy.load(file).astype("int64")).flatten()
        else:
            ids = encode(tokenizer, stdlib_texts(held_out=held_out))
        windows = ids[: len(ids) // options.columns * options.columns].view(-1, options.columns)
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
        parts.append(windows[order])
    held_out_texts = parts[1][: options.texts]
    half = len(held_out_texts) // 2
    if not len(parts[0]) or half < 2:
        raise ValueError("there is too little text: give more of it, or fewer --columns")
    return parts[0], held_out_texts[:half], held_out_texts[half:]


def show(console: Console, rows: Sequence[Row], target: float) -> None:
    """Prints the table, and which criterion was best."""
    table = Table(title=f"Exit criteria at {target:.0%} agreement", title_justify="left")
    for name in ("criterion", "paper"):
        table.add_column(name)
    for name in ("parameters", "saved", "agreement", "NLL", "cost, µs"):
        table.add_column(name, justify="right")
    for row in rows:
        if row.name == REFERENCES[0]:
            table.add_section()
        table.add_row(
            row.name,
            row.paper,
            f"{row.parameters:,}" if row.paper else "",
            f"{row.saved:.1%}" + ("*" if row.promised is False else ""),
            f"{row.agreement:.2%}",
            f"{row.nll_ratio:.4f}",
            "" if row.cost is None else f"{row.cost:.2f}",
        )
    console.print(table)
    lines = [
        "Parameters are those of one exit's gate. Token-layers saved, agreement with the whole "
        "model, and NLL by that of the whole model are measured on test texts. The cost is per "
        "token and gate, with the logits that it reads.",
        verdict(rows),
    ]
    if any(row.promised is False for row in rows):
        lines.insert(1, "* calibration could not promise the target.")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def verdict(rows: Sequence[Row]) -> str:
    """Which criterion saved most, and which may be as good by the test texts."""
    kept = [row for row in rows if row.promised and row.saved > 0]
    if not kept:
        return "No criterion saved anything with the promised agreement."
    best = kept[0]
    close = [row.name for row in kept[1:] if not clearly_more(best, row)]
    oracle = next(row for row in rows if row.name == REFERENCES[0])
    text = (
        f"Best: {best.name} ({best.paper}): {best.saved:.1%} of the token-layers saved, where a "
        f"gate without mistakes saves {oracle.saved:.1%}"
    )
    return text + (f"; within noise of it: {', '.join(close)}." if close else ".")


def clearly_more(left: Row, right: Row) -> bool:
    """Whether the mean difference per text is more than two standard errors above zero."""
    gains = torch.tensor(left.saved_by_text) - torch.tensor(right.saved_by_text)
    return float(gains.mean()) > 2 * float(gains.std()) / len(gains) ** 0.5


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison."""
    parser, options = parse_arguments(arguments)
    began = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console(width=None if sys.stdout.isatty() else 124)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    budget = Budget(
        target=options.target,
        adapter_steps=options.fit_steps,
        gate_steps=options.fit_steps,
        batch=options.batch,
    )
    try:
        if options.json:
            options.json.touch()
        model, tokenizer, trained = load(options)
        model = model.to(device).eval()
        exits = options.exits or default_exits(model.config.get_text_config().num_hidden_layers)
        texts = texts_of(tokenizer, options)
        config = ExitConfig(exits=exits, gate="max_prob", adapter_rank=options.rank)
        ee = adept_fx.transform(model, config)
        loaded = time.perf_counter()
        with console.status("") as status:
            comparison = Comparison(ee, *texts, budget, say=status.update)
            rows = comparison.run()
    except (AdeptError, OSError, ValueError) as error:
        parser.error(str(error))
    seconds = time.perf_counter() - loaded
    show(console, rows, options.target)
    for name, why in comparison.skipped.items():
        console.print(f"left out: {name}: {why}", highlight=False, soft_wrap=True)
    console.print(
        f"exits at {', '.join(map(str, comparison.exits))} of {ee.adept.num_layers} layers; "
        f"{len(texts[2])} test texts of {options.columns} tokens, NLL {comparison.nll:.3f}; "
        f"{seconds:.0f} s",
        highlight=False,
        soft_wrap=True,
    )
    if options.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        settings |= asdict(budget) | {"exits": list(comparison.exits), "model_trained": trained}
        settings |= {"test_texts": len(texts[2]), "calibration_texts": len(texts[1])}
        found = {
            "settings": settings,
            "hardware": hardware(model.device),
            "nll": comparison.nll,
            "seconds": seconds,
            "seconds_with_loading": time.perf_counter() - began,
            "adapter_seconds": comparison.adapter_seconds,
            "left_out": comparison.skipped,
            "verdict": verdict(rows),
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
