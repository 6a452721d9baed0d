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


def _generate(ee: Any, scores: list[Tensor] | None = None) -> Tensor:
    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(1))
    ee.adept.set_gates(Replay(_scores() if scores is None else scores))
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


def _transformed(dtype: torch.dtype, exits: tuple[int, ...] = (1, 3)) -> tuple[Any, Any]:
    model = tiny("llama", dtype)
    config = adept_fx.ExitConfig(exits=exits, gate=Replay([]), threshold=0.5)
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
def test_what_is_captured_is_compiled_as_it_is() -> None:
    """No second capture; of programs for other modes nothing is left that could be stale."""
    _, ee = _transformed(torch.float32)
    forward, program = ee.adept._forward, ee.adept._forward.current()
    ee.train()
    forward.prepare()
    ee.eval()
    ee.adept.compile(backend="eager")
    assert forward.current() is program
    assert program.graph.stage_0.compiled
    expected = _generate(ee)
    ee.adept.uncompile()
    assert forward.current() is not program
    ee.adept.compile(backend="eager")
    ee.adept.compile(backend="eager")
    assert torch.equal(_generate(ee), expected)


def _simple_scores() -> list[Tensor]:
    """A row of the prompt leaves; then nobody and everybody in turn: few forms to compile."""
    prompt = torch.zeros(1, 2, 7)
    prompt[0, 0] = 1.0
    return [prompt, *(torch.full((1, 2, 1), float(step % 2)) for step in range(STEPS))]


@pytest.mark.slow
def test_inductor_gives_the_same_tokens() -> None:
    _, ee = _transformed(torch.float32, (2,))
    ee.adept.plan = "compact"
    expected = _generate(ee, _simple_scores())
    ee.adept.compile()
    assert torch.equal(_generate(ee, _simple_scores()), expected)


@torch.no_grad()
def _logits(ee: Any) -> Tensor:
    """Of a prompt of which one row leaves."""
    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(1))
    ee.adept.set_gates(Replay(_simple_scores()))
    logits: Tensor = ee(ids, use_cache=True).logits
    return logits.float()


@pytest.mark.slow
def test_inductor_in_bfloat16_is_as_near_to_float32_as_eager_is() -> None:
    _, exact = _transformed(torch.float32, (2,))
    _, ee = _transformed(torch.bfloat16, (2,))
    weights = {name: p.float() for name, p in ee.named_parameters() if "adept" not in name}
    exact.load_state_dict(weights, strict=False)
    exact.adept.plan = ee.adept.plan = "compact"
    oracle, eager = _logits(exact), _logits(ee)
    ee.adept.compile()
    assert (_logits(ee) - oracle).abs().max() <= 2 * (eager - oracle).abs().max()
