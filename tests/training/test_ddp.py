"""Two processes, each with half of every batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

import adept_fx
from micro import everything, settings, texts, weights


def _options(folder: Path, batch_size: int) -> list[Any]:
    online = settings(steps=2, batch_size=batch_size, tokens_per_step=999)
    cached = settings(steps=2, mode="cached", cache_dir=folder / "states", cached_tokens=200)
    return [online, cached]


def _worker(rank: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    ee = everything()
    results = [adept_fx.fit(ee, texts(32, 0), o).parts for o in _options(Path(folder), 2)]
    torch.save((results, weights(ee)), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_end_with_the_same_exits(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, (port, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    (parts, one), (_, two) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert parts == [("gates", "adapters", "kv_maps"), ("gates", "adapters")]
    assert all(torch.equal(one[name], two[name]) for name in one)
    new = weights(everything())
    assert not torch.equal(one["adept.adapters.0.up"], new["adept.adapters.0.up"])
    assert torch.equal(one["model.norm.weight"], new["model.norm.weight"])
