"""What packing costs and saves: the compacted plan against the masked-dense one.

Random Llama of about 200M parameters in bf16, one exit at half depth, at which a given share of the
tokens leaves. The numbers behind ``adept_fx/runtime/plan.py``.

    python examples/plan_costs.py
"""

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import adept_fx
from adept_fx.gates import Gate, GateInputs
from skipping_time import LAYERS, build

# rows, new tokens per row, tokens in the cache
CASES = ((16, 1, 128), (32, 1, 128), (1, 32, 0), (1, 128, 0), (1, 512, 0), (8, 32, 0))
SHARES = (0.25, 0.5, 0.75)


class Share(Gate):
    """Lets a fixed share of the tokens leave, drawn with a fixed seed."""

    share = 0.5

    def forward(self, tokens: GateInputs) -> Tensor:
        """Scores 1 for the share, 0 for the rest."""
        count = tokens.hidden.shape[0]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        scores = torch.zeros(count)
        scores[order[: round(count * self.share)]] = 1.0
        return scores


@torch.no_grad()
def seconds(ee: Any, plan: str, rows: int, tokens: int, past: int) -> float:
    """Time of one forward."""
    cache: Any = DynamicCache(config=ee.config)
    heads, width = ee.config.num_key_value_heads, ee.config.head_dim
    for layer in cache.layers if past else ():
        filled = torch.randn(rows, heads, past, width, dtype=ee.dtype)
        layer.update(filled, filled)
    ids = torch.randint(0, 1000, (rows, tokens))
    positions = torch.arange(past, past + tokens).expand(rows, tokens)
    ee.adept.plan = plan
    began = time.perf_counter()
    ee(ids, position_ids=positions, past_key_values=cache, logits_to_keep=1)
    return time.perf_counter() - began


def main() -> None:
    """Prints medians of interleaved runs."""
    gate = Share()
    config = adept_fx.ExitConfig(exits=(LAYERS // 2,), gate=gate, threshold=0.5)
    ee = adept_fx.transform(build(), config)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, bf16, eager")
    for rows, tokens, past in CASES:
        for share in SHARES:
            gate.share = share
            taken: dict[str, list[float]] = {"dense": [], "compact": []}
            for _ in range(5):
                for plan, times in taken.items():
                    times.append(seconds(ee, plan, rows, tokens, past))
            dense, compact = (statistics.median(times[1:]) for times in taken.values())
            print(
                f"{rows:3d} rows x {tokens:4d} tokens, {share:4.0%} left: dense "
                f"{dense * 1e3:7.1f} ms, compact {compact * 1e3:7.1f} ms, {compact / dense:.2f}"
            )


if __name__ == "__main__":
    main()
