"""The most memory that a call holds at once."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from adept_fx.bench.arms import Arm


@torch.no_grad()
def peak(arm: Arm) -> int:
    """Bytes of the model, its cache and the call's own values, at their highest point.

    What else lives in the process, such as the other arms' caches, does not count. On the CPU
    torch's own record of every allocation is read, of compiled code as well.

    Args:
        arm: What to call once.
    """
    arm.prepare()
    model = arm.model
    held = held_by([*model.parameters(), *model.buffers(), *_cached(arm.cache)])
    return held + (_of_device(arm) if arm.device.type == "cuda" else _of_host(arm))


def held_by(tensors: Iterable[Tensor]) -> int:
    """Bytes behind tensors; memory that several of them share counts once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _cached(cache: Any) -> list[Tensor]:
    layers = [] if cache is None else cache.layers
    found = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    return [item for pair in found for item in pair if isinstance(item, Tensor)]


def _of_device(arm: Arm) -> int:
    torch.cuda.synchronize(arm.device)
    before = torch.cuda.memory_allocated(arm.device)
    torch.cuda.reset_peak_memory_stats(arm.device)
    arm.call()
    torch.cuda.synchronize(arm.device)
    return torch.cuda.max_memory_allocated(arm.device) - before


def _of_host(arm: Arm) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        arm.call()
    results: Any = record.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: int(e.start_ns())):
        now += int(event.nbytes())
        most = max(most, now)
    return most
