"""The command line of ``adept-fx bench``. Nothing heavy is imported before it runs."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adept_fx.bench.presets import PRESETS
from adept_fx.errors import ConfigError
from adept_fx.files import require_matplotlib, require_writable

if TYPE_CHECKING:
    import torch

    from adept_fx.bench.cases import Case
    from adept_fx.bench.result import Bound
    from adept_fx.bench.runner import Setting

# How much longer than the plain model ours may compile.
_COLD = 2.0

_EPILOG = """\
Both models have the same weights, cache class and attention, and are compiled in the same mode:
the plain one by model.compile(), the rewritten one by ee.adept.compile(). They are called in turn,
and a third arm, the plain model once more, tells how far equal things differ on this machine (A/A,
19 times out of 20). Rows where that is more than 5 % say nothing and are marked as noisy.

ratio is the rewritten model's time by the plain one's; ideal what it would be if time followed the
work (FLOPs in prefill, bytes read in decode, keys and values of skipped layers included);
efficiency is ideal by ratio; memory the most bytes that a call holds at once, weights and cache
included, by those of the plain model. Without further options the standard cases are run, with the
bounds that the project holds itself to.

Exit status: 0 if no bound was missed, 1 if one was missed, 2 if the command was wrong.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "bench",
        help="measure what exits gain or cost against the plain model",
        description="Measures a rewritten model against the plain one, in one run.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--model", metavar="NAME_OR_PATH", help="a folder, or a repository owner/name")
    option("--preset", choices=PRESETS, default="200m", help="size of a Llama with random weights")
    option("--exits", type=_numbers, metavar="4,8,12", help="default: after each quarter")
    option("--exit", type=int, metavar="N", help="where tokens leave (default: the middle exit)")
    option("--phase", type=_words, metavar="prefill,decode", help="sweep these phases")
    option("--batch", type=_numbers, default=(1, 8), metavar="1,8", help="rows")
    option("--prompt", type=_numbers, default=(128, 512), metavar="128,512", help="tokens")
    option("--share", type=_shares, default=(0.0, 0.5, 1.0), metavar="0,0.5,1", help="leave early")
    option("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    option("--device", default="cpu", help="default: %(default)s")
    option("--cache", choices=("static", "dynamic"), default="static")
    option("--mode", help="as in torch.compile, for both")
    option("--no-compile", action="store_true", help="run both without compilation")
    option("--eager", action="store_true", help="time the plain model without compilation, too")
    option(
        "--seconds",
        type=float,
        default=40.0,
        help="per case (default: %(default)g), thrice on a noisy machine",
    )
    option("--against", choices=("layerskip",), help="generate against assistant_early_exit, too")
    option("--json", type=Path, metavar="FILE", help="write everything there")
    option("--plot", type=Path, metavar="FILE", help="draw the ratios (needs matplotlib)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the cases, prints a table and writes the files; returns the exit status."""
    import torch

    from adept_fx.bench import report
    from adept_fx.bench.runner import run_case

    require_writable(options.json, options.plot)
    if options.plot:
        require_matplotlib()
    device = torch.device(options.device)
    model = _model(options, device)
    setting, exit_layer = _setting(options, model)
    console = _console()
    facts = report.hardware(device) | _facts(options, model, setting)
    title = _title(facts)
    rows = []
    for case, bounds in _cases(options, exit_layer):
        with console.status(case.name):
            rows.append(run_case(model, case, setting, bounds))
        console.print(report.line(rows[-1]), highlight=False)
    console.print(report.table(rows, title))
    more = _extras(options, model, setting, exit_layer, console)
    if options.json:
        report.write_json(options.json, facts, rows, more)
    if options.plot:
        report.plot(options.plot, rows, title)
    return int(any(row.kept is False for row in rows) or more["missed"])


def _console() -> Any:
    """A terminal, or a page that is wide enough for the table."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=130)


def _extras(
    options: argparse.Namespace, model: Any, setting: "Setting", exit_layer: int, console: Any
) -> dict[str, Any]:
    from adept_fx.bench import cold, recompiles
    from adept_fx.bench.layerskip import against_layerskip

    found: dict[str, Any] = {"missed": False}
    if options.phase is None and setting.compiled:
        counted = found["recompiles"] = recompiles.count(model, setting)
        console.print(
            f"{counted['steps']} decode steps with random exits at batch sizes 1..8, after "
            f"{counted['warm_up']} to warm up: {counted['graphs']} graphs compiled (bound 0)"
        )
        seconds = found["first_calls"] = cold.first_calls(model, setting, exit_layer)
        ratio = seconds["exits"] / seconds["base"]
        console.print(
            f"until a first prompt and token, nothing compiled before: {seconds['exits']:.1f} s, "
            f"plain model {seconds['base']:.1f} s (ratio {ratio:.2f}, bound {_COLD:g}); "
            f"{seconds['leaving']:.1f} s more for the first ones that leave"
        )
        found["missed"] = counted["graphs"] > 0 or ratio > _COLD
    if options.against:
        found["layerskip"] = against_layerskip(model, setting, exit_layer)
        for name, value in found["layerskip"].items():
            console.print(f"{name}: {value:.1f} tokens/s")
    return found


def _model(options: argparse.Namespace, device: "torch.device") -> Any:
    import torch

    dtype = getattr(torch, options.dtype)
    if options.model is None:
        from adept_fx.bench.presets import build

        return build(options.preset, dtype, device)
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    return loaded.to(device).eval()


def _setting(options: argparse.Namespace, model: Any) -> tuple["Setting", int]:
    from adept_fx.bench.runner import Setting
    from adept_fx.inspect_model import find_decoder
    from adept_fx.model_facts import layer_count

    layers = layer_count(find_decoder(model))
    exits = options.exits or tuple(sorted({layers * part // 4 for part in (1, 2, 3)} - {0}))
    exit_layer = options.exit or exits[len(exits) // 2]
    if exit_layer not in exits:
        raise ConfigError(f"{exit_layer} is no exit point", hint=f"exit points: {exits}")
    setting = Setting(
        exits=exits,
        compiled=not options.no_compile,
        eager=options.eager,
        mode=options.mode,
        cache=options.cache,
        seconds=options.seconds,
    )
    return setting, exit_layer


def _cases(options: argparse.Namespace, exit_layer: int) -> "list[tuple[Case, tuple[Bound, ...]]]":
    from adept_fx.bench.cases import standard, sweep

    if options.phase is None:
        return list(standard(exit_layer, options.device.partition(":")[0]))
    found = sweep(options.phase, options.batch, options.prompt, options.share, exit_layer)
    return [(case, ()) for case in found]


def _facts(options: argparse.Namespace, model: Any, setting: "Setting") -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "model": options.model or options.preset,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": options.dtype,
        **asdict(setting),
    }


def _title(facts: dict[str, Any]) -> str:
    how = f"compiled ({facts['mode'] or 'default'})" if facts["compiled"] else "eager"
    return (
        f"{facts['model']}, {facts['parameters'] / 1e6:.0f}M parameters, {facts['dtype']}, "
        f"exits at {', '.join(map(str, facts['exits']))}, {facts['cache']} cache, {how}; "
        f"{facts['name']}, {facts['threads']} threads, torch {facts['torch']}"
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(item) for item in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _shares(text: str) -> tuple[float, ...]:
    return tuple(float(item) for item in text.split(","))
