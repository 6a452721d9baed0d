"""Every cache of transformers holds what it should, whoever passes it, and `generate` reads it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.utils import is_hqq_available, is_optimum_quanto_available

import adept_fx
from adept_fx import ExitConfig
from models import SLIDING_TYPES, WINDOW, tiny
from oracle import assert_cache_equal
from parity import (
    FULL,
    GREEDY,
    PADDED,
    PLANS,
    Parity,
    check_generate,
    exiting,
    pair,
    parity,
    prepared,
    says,
    some_left,
)
from product import EXITS

ROOM = 24
REAL = PADDED["attention_mask"].bool()
CACHES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "dynamic": lambda model: {"past_key_values": DynamicCache(config=model.config)},
    # Made without a config: layers come as they are written, and none drops what left its window.
    "lazy": lambda model: {"past_key_values": DynamicCache()},
    "static": lambda model: {"past_key_values": StaticCache(model.config, max_cache_len=ROOM)},
    "named_static": lambda model: {"cache_implementation": "static"},
    "roomy_static": lambda model: {"cache_implementation": "static", "max_cache_len": 50},
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("model_type", ["llama", *SLIDING_TYPES])
def test_texts_longer_than_the_window(model_type: str, kind: str) -> None:
    assert PADDED["input_ids"].shape[1] > WINDOW
    check_generate(model_type, PADDED, lambda model: {**GREEDY, **CACHES[kind](model)})


@pytest.mark.parametrize("kind", ["static", "named_static", "lazy"])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_beams_reorder_the_cache(model_type: str, kind: str) -> None:
    options = {**GREEDY, "num_beams": 3}
    check_generate(model_type, PADDED, lambda model: {**options, **CACHES[kind](model)})


@pytest.mark.parametrize("kind", ["dynamic", "lazy", "static"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text"])
def test_generate_leaves_the_caches_of_the_reference(model_type: str, kind: str) -> None:
    """Of every layer, at real tokens: also of those whose layers were skipped."""
    options = {**GREEDY, "return_dict_in_generate": True}
    with exiting(pair(model_type)[0]) as model:
        want = model.generate(**PADDED, **options, **CACHES[kind](model))
    real = torch.cat([REAL, torch.ones(3, 7, dtype=torch.bool)], dim=1)
    for plan in PLANS:
        ee = parity(model_type, plan)
        got = ee.generate(**PADDED, **options, **CACHES[kind](ee))
        some_left(ee)
        assert torch.equal(got.sequences, want.sequences)
        what = f"{model_type} {kind} {plan}"
        assert_cache_equal(got.past_key_values, want.past_key_values, real, what)


@pytest.mark.parametrize("plan", PLANS)
def test_one_prompt_is_read_once_and_answered_often(plan: str) -> None:
    """Copies of a prompt's cache; a static cache that is reset; a dynamic one that is cropped."""
    ee = parity("llama", plan)
    want = says(ee, FULL, GREEDY)
    part = {name: value[:, :-1] for name, value in FULL.items()}
    prompt = DynamicCache(config=ee.config)
    positions = torch.arange(8).expand(3, 8)
    with torch.no_grad():
        ee(**part, position_ids=positions, past_key_values=prompt)
    for _ in range(2):
        options = {**GREEDY, "past_key_values": copy.deepcopy(prompt)}
        assert torch.equal(says(ee, FULL, options), want)
    assert torch.equal(says(ee, FULL, {**GREEDY, "past_key_values": prompt}), want)
    prompt.crop(-8)
    assert prompt.get_seq_length() == 8
    assert torch.equal(says(ee, FULL, {**GREEDY, "past_key_values": prompt}), want)

    static = StaticCache(ee.config, max_cache_len=ROOM)
    for _ in range(2):
        assert torch.equal(says(ee, FULL, {**GREEDY, "past_key_values": static}), want)
        static.reset()


def needs(library: str, there: bool) -> Any:
    return pytest.mark.skipif(
        not there, reason=f"the quantized cache's backend {library} is absent"
    )


QUANTIZED: list[Any] = [
    pytest.param({"backend": "fp8"}, id="fp8"),
    pytest.param(
        {"backend": "hqq", "axis_key": 1, "axis_value": 1, "q_group_size": 8},
        id="hqq",
        marks=needs("hqq", is_hqq_available()),
    ),
    pytest.param(
        {"backend": "quanto", "q_group_size": 8},
        id="quanto",
        # It builds a C++ extension where it runs for the first time.
        marks=[needs("optimum-quanto", is_optimum_quanto_available()), pytest.mark.slow],
    ),
]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("settings", QUANTIZED)
def test_quantized_caches(settings: dict[str, Any], beams: int) -> None:
    """They scale the keys of all rows together, padding included: so there is none here."""
    settings = settings if settings["backend"] == "fp8" else {**settings, "residual_length": 4}
    options = {**GREEDY, "num_beams": beams}
    named = {"cache_implementation": "quantized", "cache_config": settings}
    check_generate("llama", FULL, lambda _: {**options, **named})

    def passed(model: Any) -> dict[str, Any]:
        return {**options, "past_key_values": QuantizedCache(config=model.config, **settings)}

    check_generate("llama", FULL, passed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloaded caches need a CUDA device")
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloaded_caches(kind: str, model_type: str) -> None:
    model: Any = tiny(model_type)
    model.to("cuda")
    ee = adept_fx.transform(model, ExitConfig(exits=EXITS, gate=Parity(), threshold=0.5))
    prompt = {name: value.to("cuda") for name, value in PADDED.items()}
    options = {**GREEDY, "cache_implementation": kind, "disable_compile": True}
    never = says(prepared(ee, "dense", threshold=1.0), prompt, options)
    assert torch.equal(never, says(model, prompt, options))
    with exiting(model):
        want = says(model, prompt, options)
    for plan in PLANS:
        assert torch.equal(says(prepared(ee, plan), prompt, options), want), plan
        some_left(ee)
