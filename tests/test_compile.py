"""``ee.adept.compile``: equal tokens, no memory, and a clear error when the model changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import adept_fx
from adept_fx.errors import StaleGraphError
from adept_fx.gates import Replay
from models import tiny

STEPS = 6


def _scores() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    prompt = torch.rand(2, 2, 7, generator=generator) * 0.7
    return [prompt, *(torch.rand(2, 2, 1, generator=generator) for _ in range(STEPS))]


def _generate(ee: Any) -> Tensor:
    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(1))
    ee.adept.set_gates(Replay(_scores()))
    return ee.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
    )


def _bytes(model: torch.nn.Module) -> int:
    storages = [p.untyped_storage() for p in model.parameters()]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _transformed(dtype: torch.dtype) -> tuple[Any, Any]:
    model = tiny("llama", dtype)
    config = adept_fx.ExitConfig(exits=(1, 3), gate=Replay([]), threshold=0.5)
    return model, adept_fx.transform(model, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gives_the_same_tokens_and_takes_no_memory(dtype: torch.dtype) -> None:
    model, ee = _transformed(dtype)
    expected, size = _generate(ee), _bytes(model)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    ee.adept.compile(backend="eager")
    assert torch.equal(_generate(ee), expected)
    assert "project_stacked" in ee.adept.graph.kv_0.graph.code
    assert _bytes(model) == size
    restored = adept_fx.restore(ee)
    assert _bytes(restored) == size
    for name, parameter in restored.named_parameters():
        assert torch.equal(parameter, weights[name]), name
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name
    assert torch.equal(_generate(ee), expected)


def test_a_change_under_a_compiled_graph_raises() -> None:
    _, ee = _transformed(torch.float32)
    ee.adept.compile(backend="eager")
    ee.to(torch.bfloat16)
    with pytest.raises(StaleGraphError, match=r"changed .* after adept\.compile"):
        _generate(ee)
    ee.adept.uncompile()
    assert _generate(ee).shape == (2, 7 + STEPS)


@pytest.mark.slow
def test_inductor_gives_the_same_tokens() -> None:
    _, ee = _transformed(torch.float32)
    expected = _generate(ee)
    ee.adept.compile()
    assert torch.equal(_generate(ee), expected)
