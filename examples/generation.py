"""What exits save in generation: train, fit, calibrate to 98 % agreement, and time it.

Trains a Llama of 12 layers on the bytes of the Python standard library by the recipe of LayerSkip
(once; it is kept in the user's cache directory), trains exit adapters and KV maps, and the gates if
they learn, calibrates thresholds on two thirds of the held-out text, and reads the others: prompts
at once, then token by token, with the compiled original and the compiled rewritten model in turn.
With `--model` it does the same to any other model, whose weights stay as they are.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

import adept_fx
from _forced import Reading, Thresholds, bigram_nll, read, read_in_turn
from _kv_margin import kv_margin
from _stdlib_lm import Settings, encode, load_or_train, stdlib_texts
from _train import train
from adept_fx import AdeptError, ExitConfig, FitConfig
from adept_fx.bench.report import hardware
from adept_fx.gates import MLP

SHARE = 0.08
"""Of the standard library's files, kept out of all training."""

SETTINGS = Settings(
    layers=12,
    hidden=160,
    heads=4,
    mlp=448,
    vocabulary=259,
    length=256,
    batch=4,
    steps=100_000,
    seconds=480.0,
    exit_weight=0.3,
    first_exit=6,
    exit_step=6,
    exit_share=0.5,
    distillation=1.0,
    compiled=True,
    held_out_share=SHARE,
)


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, Any]:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(description="Measures what early exits save in generation.")
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--model", metavar="NAME_OR_PATH", help="any causal language model; default: train one")
    add("--exits", metavar="6,9", help="default: after half of the layers")
    add("--gate", choices=("top_gap", "max_prob", "mlp"), default="top_gap", help="(top_gap)")
    add("--target", type=float, default=0.98, help="next-token agreement (0.98)")
    add("--batch", type=int, default=64, help="rows (64)")
    add("--columns", type=int, default=256, help="tokens of a text; half is prompt (256)")
    add("--texts", type=int, default=1536, help="held-out texts (1536): two of three calibrate")
    add("--fit-steps", type=int, default=300, help="training steps of adapters and gates (300)")
    add("--map-steps", type=int, default=200, help="training steps of KV maps (200)")
    add("--device", default="cpu", help="default: cpu")
    options = parser.parse_args(arguments)
    if min(options.batch, options.columns // 4, options.fit_steps, options.map_steps) < 1:
        parser.error("numbers must be positive")
    return parser, options


def load(options: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The model, its tokenizer, and how it was trained."""
    if options.model:
        tokenizers: Any = transformers.AutoTokenizer
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
        return model, tokenizers.from_pretrained(options.model), {"backbone": "frozen"}
    model, tokenizer, figures = load_or_train(SETTINGS, train)
    return model, tokenizer, {"backbone": "layerskip", **figures}


def texts_of(tokenizer: Any, columns: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids to train on `[N]`, held-out texts to calibrate on and to test on `[n, columns]`."""
    ids = encode(tokenizer, stdlib_texts(held_out=False, share=SHARE))
    held_out = encode(tokenizer, stdlib_texts(held_out=True, share=SHARE))
    windows = held_out[: len(held_out) // columns * columns].view(-1, columns)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    windows = windows[: min(count, len(windows))]
    cut = len(windows) * 2 // 3
    return ids, windows[:cut], windows[cut:]


def config_of(options: Any, model: Any) -> ExitConfig:
    """An exit at half depth, or those that are wanted, with adapters and KV maps to train."""
    layers = model.config.get_text_config().num_hidden_layers
    exits = tuple(int(part) for part in (options.exits or str(layers // 2)).split(","))
    width = model.config.get_text_config().hidden_size
    gate = options.gate
    if gate == "mlp":
        gate = tuple(MLP(width, width=128, dtype=torch.float32) for _ in exits)
    ranks = {"adapter_rank": min(64, width), "kv_rank": min(32, width)}
    return ExitConfig(exits=exits, gate=gate, kv="map_per_layer", **ranks)


def fit(ee: Any, ids: Tensor, options: Any) -> dict[str, float]:
    """Trains KV maps, then adapters and gates, on text that the model was trained on."""
    seconds = {}
    parts_of_exits = ("gates", "adapters") if options.gate == "mlp" else ("adapters",)
    shuffled = ids[: len(ids) // options.columns * options.columns].view(-1, options.columns)
    order = torch.randperm(len(shuffled), generator=torch.Generator().manual_seed(1))
    for name, parts, steps in (
        ("fit_maps_seconds", ("kv_maps",), options.map_steps),
        ("fit_seconds", parts_of_exits, options.fit_steps),
    ):
        began = time.perf_counter()
        config = FitConfig(
            train=parts,
            steps=steps,
            batch_size=4,
            length=options.columns,
            trainer={"logging_steps": max(1, steps // 4)},
        )
        print(adept_fx.fit(ee, shuffled[order], config))
        seconds[name] = time.perf_counter() - began
    return seconds


def calibrate(ee: Any, texts: Tensor, options: Any) -> Any:
    """Thresholds that keep the wanted agreement in prefill; decoding is given the same.

    Calibrating for decoding, too, would feed all texts token by token, some ten times: too long for
    an example, which measures on other texts what comes of it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        found = adept_fx.calibrate(
            ee,
            texts,
            target=options.target,
            phase="prefill",
            bound="betting",
            length=options.columns,
            batch_size=options.batch,
        )
    print(found)
    ee.adept.thresholds = ee.adept.prefill_thresholds
    return found


def measure(model: Any, ee: Any, texts: Tensor, options: Any) -> dict[str, Reading]:
    """The compiled original, the rewritten model, and the same with nobody leaving."""
    arms = {
        "base": (model, None),
        "never exits": (ee, Thresholds(ee.adept, 1.0)),
        "with exits": (ee, None),
    }
    ee.adept.stats.reset()
    return read_in_turn(arms, texts, options.batch, options.columns // 2)


def figures_of(readings: dict[str, Reading]) -> dict[str, Any]:
    """The figures that count."""
    base, never, early = readings["base"], readings["never exits"], readings["with exits"]
    return {
        "time_ratio": early.total / base.total,
        "time_ratio_prefill": early.seconds["prefill"] / base.seconds["prefill"],
        "time_ratio_decode": early.seconds["decode"] / base.seconds["decode"],
        "time_ratio_never_exits": never.total / base.total,
        "time_ratio_to_never_exits": early.total / never.total,
        "agreement": early.agreement(base),
        "agreement_never_exits": never.agreement(base),
        "nll": early.nll,
        "base_nll": base.nll,
        "nll_ratio": early.nll / base.nll,
        "test_tokens": sum(early.tokens.values()),
    }


def layers_run(ee: Any, texts: Tensor, options: Any) -> dict[str, float]:
    """Share of the token-layers that were executed, per phase."""
    ee.adept.stats.reset()
    reading = Reading()
    for rows in texts[: len(texts) // options.batch * options.batch].split(options.batch):
        read(ee, rows, options.columns // 2, reading)
    stats = ee.adept.stats
    return {
        f"{phase}_layers": stats.executed[phase] / stats.total[phase]
        for phase in ("prefill", "decode")
    } | {
        f"{phase}_layers_needed": stats.needed[phase] / stats.total[phase]
        for phase in ("prefill", "decode")
    }


def show(console: Console, readings: dict[str, Reading], figures: dict[str, Any]) -> None:
    """Prints the figures."""
    table = Table(title="Held-out text, read with both models in turn", title_justify="left")
    for name in ("", "prefill, s", "decode, s", "time", "agreement", "NLL"):
        table.add_column(name, justify="right" if name else "left")
    base = readings["base"]
    for name, item in readings.items():
        table.add_row(
            name,
            f"{item.seconds['prefill']:.2f}",
            f"{item.seconds['decode']:.2f}",
            f"{item.total / base.total:.3f}",
            f"{item.agreement(base):.2%}",
            f"{item.nll:.4f}",
        )
    console.print(table)
    lines = [
        "time {time_ratio:.3f} of the base's (prefill {time_ratio_prefill:.3f}, decode "
        "{time_ratio_decode:.3f}); {time_ratio_to_never_exits:.3f} of the rewritten model's with "
        "nobody leaving",
        "agreement {agreement:.2%}, NLL ratio {nll_ratio:.4f}",
        "token-layers executed: prefill {prefill_layers:.1%}, decode {decode_layers:.1%} "
        "(needed: {prefill_layers_needed:.1%}, {decode_layers_needed:.1%})",
        "base NLL {base_nll:.3f}, bigram model {bigram_nll:.3f}: {nats_below_bigram:.2f} nats "
        "lower",
        "later tokens under 50 % random exits after {kv_exit} layers: NLL {kv_nll_maps:.5f} with "
        "KV maps, {kv_nll_plain:.5f} without, margin {kv_margin:.5f}",
        "fit {fit_seconds:.0f} s, maps {fit_maps_seconds:.0f} s, everything {seconds:.0f} s",
    ]
    for line in lines:
        console.print(line.format(**figures), highlight=False, soft_wrap=True)
    if figures["nats_below_bigram"] < 1:
        console.print("[bold]This model has learned too little: its early exits prove nothing.[/]")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment."""
    parser, options = parse_arguments(arguments)
    began = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console()
    torch.manual_seed(0)
    try:
        if options.json:
            options.json.touch()
        model, tokenizer, settings = load(options)
        model = model.to(options.device).eval()
        config = config_of(options, model)
        ids, calibration, test = texts_of(tokenizer, options.columns, options.texts)
        test = test.to(options.device)
        ee = adept_fx.transform(model, config)
        figures: dict[str, Any] = fit(ee, ids, options)
        figures |= kv_margin(ee, test)
        # Compiled, it rounds differently, and would be compiled once more for the growing cache
        # that calibration gives it: a minute that the other texts do not need.
        found = calibrate(ee, calibration, options)
        model.compile(dynamic=False)
        ee.adept.compile()
        readings = measure(model, ee, test, options)
    except (AdeptError, OSError, ValueError) as error:
        parser.error(str(error))
    figures |= figures_of(readings) | layers_run(ee, test, options)
    vocabulary = model.config.get_text_config().vocab_size
    figures["bigram_nll"] = bigram_nll(ids, test.cpu(), vocabulary)
    figures["nats_below_bigram"] = figures["bigram_nll"] - figures["base_nll"]
    figures["seconds"] = time.perf_counter() - began
    show(console, readings, figures)
    if options.json:
        settings |= {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        settings |= {"exits": list(config.exit_layers), "dtype": str(model.dtype)}
        settings |= {"parameters": sum(p.numel() for p in model.parameters())}
        machine = hardware(model.device) | {"transformers": transformers.__version__}
        everything = figures | {"settings": settings, "hardware": machine}
        everything["calibration"] = found.to_dict()
        options.json.write_text(json.dumps(everything, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
