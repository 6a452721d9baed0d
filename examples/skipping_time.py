"""Does a skipped layer cost no time? Decodes with a random Llama of 200M parameters, batch 1.

Compares, interleaved in one run: the original model, the rewritten model that never exits
(gates running), and the same model with all tokens out at half depth (by replay). Weights are
random: this measures time, not quality.

    python examples/skipping_time.py
"""

import argparse
import platform
import statistics
import time
from typing import Any

import torch
from transformers import DynamicCache

import adept_fx
from adept_fx.bench import presets
from adept_fx.bench.presets import PRESETS
from adept_fx.gates import FixedDepth

PRESET = "200m"
LAYERS = PRESETS[PRESET]["num_hidden_layers"]


def build() -> Any:
    """A Llama of about 200M parameters, 16 layers, bf16, with random weights."""
    return presets.build(PRESET, torch.bfloat16, torch.device("cpu"))


@torch.no_grad()
def decode(model: Any, prompt: torch.Tensor, steps: int) -> float:
    """Median seconds of a decode step after ``prompt``."""
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache, logits_to_keep=1)
    token, seconds = prompt[:, -1:], []
    for step in range(steps):
        position = torch.full_like(token, prompt.shape[1] + step)
        began = time.perf_counter()
        out = model(token, position_ids=position, past_key_values=cache)
        seconds.append(time.perf_counter() - began)
        token = out.logits[:, -1:].argmax(-1)
    return statistics.median(seconds)


def main() -> None:
    """Prints the medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=128, help="tokens in the prompt")
    parser.add_argument("--steps", type=int, default=40, help="decode steps per round")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    options = parser.parse_args()
    model = build()
    config = adept_fx.ExitConfig(exits=(LAYERS // 2,), gate=FixedDepth(0), threshold=1.0)
    ee = adept_fx.transform(model, config)
    prompt = torch.randint(0, 16384, (1, options.prompt))
    arms: dict[str, list[float]] = {"original": [], "never exit": [], "all out at half depth": []}
    for number in range(options.rounds + 1):
        for name, seconds in arms.items():
            ee.adept.thresholds = 0.5 if name.startswith("all") else 1.0
            taken = decode(model if name == "original" else ee, prompt, options.steps)
            if number:  # the first round warms up
                seconds.append(taken)
    medians = {name: statistics.median(seconds) for name, seconds in arms.items()}
    size = sum(p.numel() for p in model.parameters()) / 1e6
    threads = torch.get_num_threads()
    print(f"Llama, {size:.0f}M parameters, {LAYERS} layers, bf16, batch 1, eager")
    print(f"{platform.machine()}, {threads} threads, torch {torch.__version__}")
    for name, median in medians.items():
        print(f"  {name:24s}{median * 1e3:8.2f} ms per token")
    ratio = medians["all out at half depth"] / medians["never exit"]
    print(f"all out at half depth / never exit: {ratio:.3f}")
    print(f"never exit / original:              {medians['never exit'] / medians['original']:.3f}")


if __name__ == "__main__":
    main()
