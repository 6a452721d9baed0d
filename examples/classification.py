"""Classifies snippets of code with a Llama whose rows are done as soon as they are sure.

Which package of the standard library is a snippet of 128 tokens from? Trains a small Llama for it
(at most five minutes on two CPU cores, and only the first time), rewrites it, trains an adapter and
a gate for every exit, calibrates the thresholds, and measures all against the compiled original:

    python examples/classification.py [--json result.json]

Files that snippets are tested or calibrated on were kept out of training as a whole.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import adept_fx
from _snippets import Snippets, SnippetSettings, cut, load_data, load_or_train
from adept_fx import ExitConfig, FitConfig
from adept_fx.bench.report import hardware
from adept_fx.gates import Entropy, FixedDepth, Gate

_ROUNDS = 5
_FITTED_ON = 1280


@dataclass(frozen=True)
class Arm:
    """A way to classify: gates and thresholds, or the original model if there are none."""

    gates: tuple[Gate, ...] = ()
    thresholds: tuple[float, ...] = ()


@dataclass
class Figures:
    """What one way of classifying gave."""

    accuracy: float
    agreement: float
    layers: float
    work: float
    milliseconds: float = 0.0
    speed: float = 1.0


class Classifier:
    """The original and the rewritten model, both compiled, and the ways to use them."""

    def __init__(self, model: Any, ee: Any, batch: int) -> None:
        self.model, self.ee, self.batch = model, ee, batch

    @torch.inference_mode()
    def call(self, arm: Arm, ids: Tensor) -> Tensor:
        """Logits of a batch."""
        places = torch.arange(ids.shape[1]).expand(ids.shape)
        if not arm.gates:
            return self.model(input_ids=ids, position_ids=places).logits
        return self.ee(input_ids=ids, position_ids=places).logits

    def use(self, arm: Arm) -> None:
        """Makes the rewritten model leave as this arm does."""
        if arm.gates:
            self.ee.adept.set_gates(arm.gates)
            self.ee.adept.thresholds = arm.thresholds

    def batches(self, snippets: Snippets) -> list[Tensor]:
        """Full batches of one size: what is left over is left out."""
        return [ids for ids in snippets.ids.split(self.batch) if len(ids) == self.batch]

    def run(self, arm: Arm, snippets: Snippets) -> tuple[Tensor, float, float]:
        """Classes, mean layers per row, and share of the token-layers that were computed."""
        self.use(arm)
        self.ee.adept.stats.reset()
        found, depths = [], []
        for ids in self.batches(snippets):
            found.append(self.call(arm, ids).argmax(-1))
            if arm.gates:
                depths.append(self.ee.adept.last_depth[:, -1].float())
        if not arm.gates:
            return torch.cat(found), float(self.ee.adept.num_layers), 1.0
        stats = self.ee.adept.stats
        work = stats.executed_token_layers / stats.total_token_layers
        return torch.cat(found), float(torch.cat(depths).mean()), work

    def seconds(
        self, arms: Mapping[str, Arm], snippets: Snippets, budget: float
    ) -> dict[str, list[float]]:
        """Seconds per batch, medians over rounds in which all arms run the same batch in turn."""
        order = random.Random(0)
        batches = self.batches(snippets)
        times: dict[str, list[list[float]]] = {name: [[] for _ in batches] for name in arms}
        begin = time.perf_counter()
        for turn in range(_ROUNDS):
            for at, ids in enumerate(batches):
                for name in order.sample(list(arms), len(arms)):
                    self.use(arms[name])
                    start = time.perf_counter()
                    self.call(arms[name], ids)
                    times[name][at].append(time.perf_counter() - start)
                if turn and time.perf_counter() - begin > budget:
                    return _medians(times)
        return _medians(times)


def _medians(times: Mapping[str, list[list[float]]]) -> dict[str, list[float]]:
    return {name: [statistics.median(t) for t in found] for name, found in times.items()}


def fit(ee: Any, snippets: Snippets, steps: int, show: Callable[[str], None]) -> None:
    """Trains adapters and gates on the states that one run over the snippets leaves."""
    with tempfile.TemporaryDirectory() as folder:
        config = FitConfig(
            steps=steps,
            batch_size=32,
            length=snippets.ids.shape[1],
            tokens_per_step=128,
            mode="cached",
            cache_dir=Path(folder) / "states",
            cached_tokens=_FITTED_ON,
            trainer={"disable_tqdm": True, "logging_strategy": "no"},
        )
        show(str(adept_fx.fit(ee, snippets.items(), config)))


def entropy_arm(classifier: Classifier, layers: float, snippets: Snippets) -> Arm:
    """The same exits and adapters with entropy as the gate, at the same number of layers."""
    exits = len(classifier.ee.adept.config.exit_layers)
    snippets, _ = snippets.split(16 * classifier.batch)
    low, high = 0.0, 1.0
    arm = Arm((Entropy(),) * exits, (0.5,) * exits)
    for _ in range(8):
        middle = (low + high) / 2
        arm = Arm(arm.gates, (middle,) * exits)
        deeper = classifier.run(arm, snippets)[1] > layers
        low, high = (low, middle) if deeper else (middle, high)
    return arm


def depth_arms(classifier: Classifier, layers: float) -> dict[str, Arm]:
    """Every row leaves at one exit: the last that costs no more, and the next one."""
    exits = classifier.ee.adept.config.exit_layers
    below = max((i for i, e in enumerate(exits) if e <= layers), default=0)
    return {
        f"all leave after {exits[at]}": Arm((FixedDepth(at),) * len(exits), (0.5,) * len(exits))
        for at in (below, below + 1)
        if at < len(exits)
    }


def measure(
    classifier: Classifier, arms: Mapping[str, Arm], snippets: Snippets, budget: float
) -> dict[str, Figures]:
    """Quality, work and time of all arms on the same snippets."""
    first = next(iter(arms))
    found = {name: classifier.run(arm, snippets) for name, arm in arms.items()}
    labels = snippets.labels[: len(found[first][0])]
    figures = {}
    for name, (classes, layers, work) in found.items():
        accuracy = float((classes == labels).double().mean())
        agreement = float((classes == found[first][0]).double().mean())
        figures[name] = Figures(accuracy, agreement, layers, work)
    seconds = {
        name: sum(t) / len(t) for name, t in classifier.seconds(arms, snippets, budget).items()
    }
    for name, item in figures.items():
        item.milliseconds = 1000 * seconds[name]
        item.speed = seconds[first] / seconds[name]
    return figures


def table(figures: Mapping[str, Figures], batch: int) -> Table:
    """What is printed in the end."""
    result = Table(title=f"Held-out snippets of 128 tokens, {batch} at a time")
    for name in ("", "accuracy", "agreement", "mean layers", "work", "ms per batch", "speed"):
        result.add_column(name, justify="right" if name else "left")
    for name, item in figures.items():
        result.add_row(
            name,
            f"{item.accuracy:.1%}",
            f"{item.agreement:.1%}",
            f"{item.layers:.2f}",
            f"{item.work:.1%}",
            f"{item.milliseconds:.1f}",
            f"{item.speed:.2f}x",
        )
    return result


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--seconds", type=float, default=300.0, help="most seconds of training")
    parser.add_argument("--fit-steps", type=int, default=200, help="steps of adapters and gates")
    parser.add_argument("--target", type=float, default=0.94, help="agreement to be promised")
    parser.add_argument("--batch", type=int, default=32, help="snippets per call")
    parser.add_argument("--budget", type=float, default=90.0, help="about how long to measure")
    return parser.parse_args()


def main() -> None:
    """Trains, rewrites, fits, calibrates, compiles, measures."""
    options, console, begin = arguments(), Console(), time.perf_counter()
    settings, data = SnippetSettings(seconds=options.seconds), load_data()
    model, tokenizer, trained = load_or_train(settings, data)
    training = cut(tokenizer, data.texts, settings.length).shuffled(0)
    held_out = cut(tokenizer, data.held_out, settings.length).shuffled(0)
    calibration, test = held_out.split(len(held_out.ids) // 2)
    console.print(f"which package? {', '.join(data.packages)}")
    console.print(
        f"a Llama of {settings.layers} layers after {trained['snippets']:.0f} snippets and "
        f"{trained['seconds']:.0f} s; {len(calibration.ids)} others to calibrate, "
        f"{len(test.ids)} to test"
    )
    torch.manual_seed(settings.seed)
    config = ExitConfig(exits="every:1", gate="mlp", adapter_rank=16, leave="rows")
    ee = adept_fx.transform(model, config)
    fit(ee, training, options.fit_steps, console.print)
    console.print(f"fitted after {time.perf_counter() - begin:.0f} s")
    model.compile()
    ee.adept.compile()
    found = adept_fx.calibrate(
        ee,
        calibration.items(),
        target=options.target,
        length=settings.length,
        batch_size=options.batch,
    )
    console.print(str(found), markup=False)
    console.print(f"calibrated after {time.perf_counter() - begin:.0f} s")
    classifier = Classifier(model, ee, options.batch)
    ours = Arm(tuple(ee.adept.gate_list()), ee.adept.prefill_thresholds)
    layers = classifier.run(ours, calibration)[1]
    arms = {
        "whole model": Arm(),
        "gates": ours,
        "entropy": entropy_arm(classifier, layers, calibration),
        **depth_arms(classifier, layers),
    }
    figures = measure(classifier, arms, test, options.budget)
    classifier.use(ours)
    console.print(table(figures, options.batch))
    whole, own = figures["whole model"], figures["gates"]
    result = {
        "speedup": own.speed,
        "accuracy_loss": whole.accuracy - own.accuracy,
        "accuracy_full": whole.accuracy,
        "accuracy": own.accuracy,
        "agreement": own.agreement,
        "mean_layers": own.layers,
        "layers": settings.layers,
        "exits": ee.adept.config.exit_layers,
        "thresholds": ours.thresholds,
        "arms": {name: asdict(item) for name, item in figures.items()},
        "arm_thresholds": {name: arm.thresholds for name, arm in arms.items()},
        "calibration": found.to_dict(),
        "snippets": {"calibration": len(calibration.ids), "test": len(test.ids)},
        "packages": data.packages,
        "training": trained,
        "settings": asdict(settings),
        "options": {k: v for k, v in vars(options).items() if k != "json"},
        "hardware": hardware(torch.device("cpu")),
        "seconds": time.perf_counter() - begin,
    }
    console.print(
        f"{own.speed:.2f}x at an accuracy of {own.accuracy:.1%} instead of {whole.accuracy:.1%}; "
        f"{result['seconds']:.0f} s in all"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2), "utf-8")


if __name__ == "__main__":
    main()
