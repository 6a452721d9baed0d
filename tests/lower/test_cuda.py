"""Compiled models on a CUDA device, with and without CUDA graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

import adept_fx
from adept_fx import cli
from adept_fx.gates import Replay
from adept_fx.runtime.plan import bucket
from models import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EXITS, PROMPT, STEPS = (1, 2, 3), 16, 24


@torch.no_grad()
def _talk(ee: Any, rows: int, plan: str) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and depths of a prompt and some steps with random exits."""
    generator = torch.Generator().manual_seed(rows)
    shapes = [(len(EXITS), rows, PROMPT), *[(len(EXITS), rows, 1)] * STEPS]
    scores = [torch.rand(*shape, generator=generator) for shape in shapes]
    ids = torch.randint(3, 100, (rows, PROMPT + STEPS), generator=generator).cuda()
    ee.adept.plan = plan
    ee.adept.set_gates(Replay(scores))
    cache = StaticCache(config=ee.config, max_cache_len=64)
    found, depths = [ee(ids[:, :PROMPT], past_key_values=cache).logits], [ee.adept.last_depth]
    for at in range(PROMPT, PROMPT + STEPS):
        places = torch.full((rows, 1), at, device="cuda")
        out = ee(ids[:, at : at + 1], position_ids=places, past_key_values=cache)
        found.append(out.logits)
        depths.append(ee.adept.last_depth)
    return found, depths


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize(("rows", "plan"), [(1, "auto"), (4, "compact"), (4, "dense")])
def test_compiled_equals_eager(rows: int, plan: str, mode: str | None) -> None:
    """Earlier outputs stay what they were: nothing of a step is overwritten by the next one."""
    model = tiny("llama")
    model.to("cuda")  # type: ignore[arg-type]
    config = adept_fx.ExitConfig(exits=EXITS, gate=Replay([]), threshold=0.5)
    ee = adept_fx.transform(model, config)
    expected, depths = _talk(ee, rows, plan)
    ee.adept.compile(mode=mode)
    for _ in range(3):  # the first calls compile and record
        found, found_depths = _talk(ee, rows, plan)
    for a, b in zip(expected, found, strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()
    assert all(map(torch.equal, depths, found_depths))


def test_packed_sizes_are_few() -> None:
    device = torch.device("cuda")
    assert {bucket(count, device) for count in range(1, 65)} == {2, 4, 8, 16, 32, 64}


def test_the_benchmark(tmp_path: Path) -> None:
    """Writes what was measured, with the hardware's name."""
    file = tmp_path / "cuda.json"
    command = ["bench", "--preset", "tiny", "--device", "cuda", "--mode", "reduce-overhead"]
    assert cli.main([*command, "--seconds", "2", "--json", str(file)]) in (0, 1)
    assert torch.cuda.get_device_name() in file.read_text("utf-8")
