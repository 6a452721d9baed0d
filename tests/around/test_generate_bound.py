"""What transformers binds to one model: calls and loops that must not run another."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig

import adept_fx
from adept_fx import ExitConfig
from adept_fx.errors import UnsupportedModelError
from models import tiny
from parity import FULL, GREEDY, ONE, PADDED, Parity, says, small, some_left


def test_the_compiled_call_of_static_caches() -> None:
    """What `generate` does by itself on accelerators: `torch.compile` around the whole model.

    The original keeps the compiled call from an earlier text: its own, not the rewritten model's.
    """
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = CompileConfig(backend=backend, mode=None)  # type: ignore[arg-type]
    compiled._compile_all_devices = True  # type: ignore[assignment]
    options = {**GREEDY, "max_new_tokens": 2, "cache_implementation": "static"}
    model: Any = tiny("llama", layers=2)
    model.get_compiled_call(compiled)
    ee = adept_fx.transform(model, ExitConfig(exits=(1,), gate=Parity(), threshold=0.5))
    want = says(ee, PADDED, options)
    ee.adept.stats.reset()
    graphs.clear()
    try:
        got = says(ee, PADDED, {**options, "compile_config": compiled})
    finally:
        torch._dynamo.reset()
    assert graphs
    assert ee.adept.stats.seen["decode"] == [3]
    assert torch.equal(got, want)


def test_a_generate_of_the_models_own() -> None:
    """As a repository with a loop of its own puts it on the model that is loaded from it."""

    def generate(inputs: Tensor, model: Any) -> Tensor:
        return type(model).generate(model, inputs, **GREEDY)

    model: Any = tiny("llama", layers=2)
    model.generate = partial(generate, model=model)
    ee = adept_fx.transform(model, ExitConfig(exits=(1,), gate=Parity(), threshold=0.5))
    ee.generate(FULL["input_ids"])
    some_left(ee)
    adept_fx.restore(ee).generate(FULL["input_ids"])
    assert ee.adept.stats.seen["prefill"] == [FULL["input_ids"].numel()]


def test_continuous_batching_is_refused() -> None:
    """Where transformers would log an error of its own thread and return nothing."""
    _, ee = small("llama")
    for act in (
        lambda: ee.generate_batch([[5, 6, 7]], max_new_tokens=2),
        lambda: ee.generate(ONE["input_ids"], cache_implementation="paged", max_new_tokens=2),
        ee.init_continuous_batching,
    ):
        with pytest.raises(UnsupportedModelError, match="continuous batching"):
            act()
    assert "init_continuous_batching" not in vars(adept_fx.restore(ee))
