"""What a transformed model refuses: at transform because of its state, or at the call at fault."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adept_fx
from adept_fx import ExitConfig
from adept_fx.errors import ConfigError, GateError, InputError, UnsupportedModelError
from adept_fx.gates import FixedDepth, Gate, GateInputs, MaxProb, Replay
from intact import IDS, intact, refuses
from models import tiny
from product import raw, rewritten, set_up

STAY = torch.zeros(2, *IDS.shape)


def shared(scores: list[Tensor] | None = None) -> tuple[Any, Any]:
    """The llama that all tests share, never exiting."""
    ee = rewritten("llama")
    set_up(ee, [STAY] * 9 if scores is None else scores, "auto")
    return raw("llama"), ee


def check_works(model: Any, ee: Any, what: str = "") -> None:
    set_up(ee, [STAY] * 9, "dense")
    with torch.no_grad():
        assert torch.equal(ee(IDS).logits, model(IDS).logits), what


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "hidden_states": ({"input_ids": IDS, "output_hidden_states": True}, "output_hidden_states"),
    "attentions": ({"input_ids": IDS, "output_attentions": True}, "output_attentions"),
    "unknown_tensor": ({"input_ids": IDS, "token_type_ids": IDS}, "token_type_ids"),
    "both": ({"input_ids": IDS, "inputs_embeds": torch.ones(2, 6, 32)}, "input_ids"),
    "neither": ({}, "input_ids"),
    "positions": ({"input_ids": IDS, "position_ids": torch.arange(6)}, "position_ids"),
    "mask_3d": ({"input_ids": IDS, "attention_mask": torch.ones(2, 6, 6)}, "attention_mask"),
    "mask_dict": (
        {"input_ids": IDS, "attention_mask": {"sliding_attention": torch.ones(2, 1, 6, 6)}},
        "full_attention",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_arguments_that_exits_cannot_serve(name: str) -> None:
    model, ee = shared()
    keywords, word = BAD_CALLS[name]
    refuses(model, InputError, word, act=lambda: ee(**keywords))
    check_works(model, ee)


def test_outputs_asked_for_through_the_config() -> None:
    model, ee = shared()
    decoder = ee.get_decoder().config
    decoder.output_hidden_states = True
    try:
        refuses(model, InputError, "output_hidden_states", act=lambda: ee(IDS))
    finally:
        decoder.output_hidden_states = False
    check_works(model, ee)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_outputs_asked_for_through_generate(name: str) -> None:
    model, ee = shared()
    options = {name: True, "return_dict_in_generate": True, "max_new_tokens": 2}
    refuses(model, InputError, name, act=lambda: ee.generate(IDS, **options))
    check_works(model, ee)


def test_router_logits() -> None:
    model = tiny("mixtral", layers=2)
    ee = adept_fx.transform(model, ExitConfig(exits=(1,), gate="linear"))
    act = lambda: ee(IDS, output_router_logits=True)  # noqa: E731
    refuses(model, InputError, "output_router_logits", act=act)


def test_assistant_early_exit() -> None:
    model = tiny("llama", layers=3)
    ee = adept_fx.transform(model, ExitConfig(exits=(1,), gate="linear"))
    options = {"assistant_early_exit": 2, "max_new_tokens": 4, "do_sample": False}
    act = lambda: ee.generate(IDS[:1], **options)  # noqa: E731
    refuses(model, InputError, "assistant_early_exit", act=act)
    # transformers leaves its change of the config behind: the model must work all the same.
    ee.adept.plan = "dense"
    with torch.no_grad():
        assert torch.equal(ee(IDS).logits, model(IDS).logits)


class Returns(Gate):
    """Returns whatever it is told to make of the states."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, tokens: GateInputs) -> Any:
        return self.make(tokens.hidden)


BAD_SCORES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "column": (lambda h: h.new_ones(len(h), 1), "shape (12, 1)"),
    "short": (lambda h: h.new_ones(len(h) - 1), "shape (11,)"),
    "scalar": (lambda h: h.new_ones(()), "shape ()"),
    "list": (lambda h: [0.5] * len(h), "list"),
    "none": (lambda h: None, "NoneType"),
    "whole": (lambda h: torch.ones(len(h), dtype=torch.long), "int64"),
    "bool": (lambda h: torch.ones(len(h), dtype=torch.bool), "bool"),
}


@pytest.mark.parametrize("name", BAD_SCORES)
def test_gates_that_return_no_scores(name: str) -> None:
    model, ee = shared()
    make, word = BAD_SCORES[name]
    ee.adept.set_gates(Returns(make))
    refuses(model, GateError, "Returns", word, act=lambda: ee(IDS))
    check_works(model, ee)


def test_nan_never_exits_and_is_warned_of_once() -> None:
    model, ee = shared()
    ee.adept.set_gates(Returns(lambda h: h.new_full((len(h),), math.nan)))
    ee.adept.thresholds, ee.adept.plan = 0.0, "dense"
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(ee(IDS).logits, model(IDS).logits)
            assert (ee.adept.last_depth == 4).all()
    texts = [str(item.message) for item in caught if "NaN" in str(item.message)]
    assert len(texts) == 1, texts
    assert "Returns" in texts[0]


def test_a_replay_that_has_ended() -> None:
    model, ee = shared([STAY])
    ee(IDS)
    refuses(model, GateError, "Replay", "1 forward calls", act=lambda: ee(IDS))
    check_works(model, ee)


def test_a_transformed_model_is_not_transformed_again() -> None:
    model, ee = shared()
    for part in (ee, ee.get_decoder()):
        with intact(model), pytest.raises(UnsupportedModelError, match="transformed already"):
            adept_fx.transform(part, ExitConfig(exits=(1,)))
    check_works(model, ee)


def test_only_transformed_models_are_restored() -> None:
    act = lambda: adept_fx.restore(raw("llama"))  # noqa: E731
    refuses(raw("llama"), UnsupportedModelError, "transform", act=act)


def test_accelerate_hooks() -> None:
    model = tiny("llama", layers=2)
    model.model.layers[1]._hf_hook = object()
    refuses(model, UnsupportedModelError, "model.layers.1", "accelerate")


def shout(module: nn.Module, *args: Any) -> None:
    """A hook."""


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_inside_the_decoder(kind: str) -> None:
    model, ee = shared()
    for name in ("layers.1", "layers.3.mlp.up_proj", "norm"):
        handle = getattr(model.model.get_submodule(name), kind)(shout)
        try:
            refuses(model, UnsupportedModelError, name, "shout")
            refuses(model, UnsupportedModelError, name, "shout", act=lambda: ee(IDS))
        finally:
            handle.remove()
    check_works(model, ee)


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan, "0.5", None, (0.5,), (0.5, 2.0), [[0.5]]])
@pytest.mark.parametrize("field", ["thresholds", "prefill_thresholds"])
def test_bad_thresholds_are_not_set(field: str, value: object) -> None:
    model, ee = shared()
    before = ee.adept.thresholds, ee.adept.prefill_thresholds
    refuses(model, ConfigError, "threshold", act=lambda: setattr(ee.adept, field, value))
    assert (ee.adept.thresholds, ee.adept.prefill_thresholds) == before


@pytest.mark.parametrize("value", ["fast", "", None, 1, ["auto"]])
def test_bad_plans_are_not_set(value: object) -> None:
    model, ee = shared()
    refuses(model, ConfigError, "plan", act=lambda: setattr(ee.adept, "plan", value))
    assert ee.adept.plan == "auto"


@pytest.mark.parametrize("value", [[], [FixedDepth()], ["mlp", "mlp"], [None, None]])
def test_bad_gates_are_not_set(value: Any) -> None:
    model, ee = shared()
    before = ee.adept.gate_list()
    refuses(model, ConfigError, "2 gates", act=lambda: ee.adept.set_gates(value))
    assert ee.adept.gate_list() == before


def test_gates_on_logits_need_a_head() -> None:
    model = raw("llama")

    def named() -> None:
        adept_fx.transform(model.model, ExitConfig(exits=(1, 3), gate=("linear", "max_prob")))

    refuses(model, UnsupportedModelError, "logits", "LlamaModel", act=named)
    bare = adept_fx.transform(tiny("llama", layers=2).model, ExitConfig(exits=(1,), gate="mlp"))

    def later() -> None:
        bare.adept.set_gates(MaxProb())
        bare(IDS)

    refuses(model, UnsupportedModelError, "logits", act=later)
    bare.adept.set_gates(Replay([STAY[:1]]))
    assert bare(IDS).last_hidden_state.shape == (2, 6, 32)
