"""Modules with recurrent state are found by what they do, and become one op each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import DynamicCache

from adept_fx.capture import Capture, capture
from adept_fx.errors import UnsupportedModelError
from adept_fx.graph import meta
from adept_fx.graph.writes import MIXER
from adept_fx.intercept import CaptureCache, Recorder
from adept_fx.intercept.cache import RecurrentAccessError, recurrent_layers
from adept_fx.ops.mixer import CacheArgument, Mixer, MixerCall
from models import tiny_config
from toy_mixers import Shift, Shifting, ShiftLayer
from toys import Toy, toy, work_of


def shifting(made: type[nn.Module] = Shift) -> Any:
    layer = type("ShiftLayer", (ShiftLayer,), {"made": made})
    return toy(type("Shifting", (Shifting,), {"layer_class": layer})).model


def marked(source: Capture) -> list[Any]:
    return source.graph.graph.find_nodes(op="call_function", target=MIXER)


def test_the_innermost_module_that_asks_for_its_state_is_one_op() -> None:
    source = capture(shifting(), positions=True)
    names = ["layers.0.shift.inner", "layers.2.shift.inner"]
    assert [call.name for call in source.mixers] == names
    assert [node.args[4] for node in marked(source)] == [0, 1]
    for node, call in zip(marked(source), source.mixers, strict=True):
        assert isinstance(call.module, Shift)
        (state,) = node.args[0]
        assert node.meta["val"].shape == state.meta["val"].shape
    for node in source.graph.graph.find_nodes(op="placeholder"):
        inside = "shift" in (meta.get(node).source or "")
        assert not (inside and node.users), "its parameters stay its own"


def test_a_class_is_traced_anew_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = Toy.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Toy, "forward", counted)
    capture(shifting(), positions=True)
    assert len(calls) == 2, "one trace finds the class, the next has all its modules as ops"


def test_a_decoder_without_recurrent_layers_is_not_watched() -> None:
    source = capture(Toy(tiny_config("llama", 2)).eval(), positions=True)
    assert source.mixers == []


def test_a_gate_cannot_ask_for_keys_of_a_layer_that_has_none() -> None:
    assert work_of(Shifting, None, (2,), ("key",)).exits == (2,)
    with pytest.raises(UnsupportedModelError, match="exit 1 needs the key of layer 0"):
        work_of(Shifting, None, (1,), ("key",))


def test_the_mixers_input_is_owed_to_it_where_its_layer_is_skipped() -> None:
    graph = work_of(Shifting, None, (1,)).graph
    stage: Any = graph.get_submodule("stage_1")
    assert [owed.slot for owed in stage.owed] == ["kv_1", "mixer_1"]
    assert [owed.mixer is None for owed in stage.owed] == [True, False]
    block: Any = graph.get_submodule("kv_0")
    assert block.slots == {"kv_1": 2, "mixer_1": 1}


class Two(Shift):
    def forward(self, hidden: Tensor, cache: Any = None) -> Any:
        found = super().forward(hidden, cache)
        return found + found, found


class Flat(Shift):
    def forward(self, hidden: Tensor, cache: Any = None) -> Any:
        return super().forward(hidden, cache).sum(-1)


@pytest.mark.parametrize("made", [Two, Flat])
def test_modules_that_return_something_else_are_refused_by_name(made: type[nn.Module]) -> None:
    decoder = shifting(made)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.shift\.inner.* else than one"):
        capture(decoder, positions=True)
    assert all("forward" not in vars(module) for module in decoder.modules())


@torch.no_grad()
def test_a_mixer_runs_the_models_own_module_with_the_calls_cache() -> None:
    decoder = shifting()
    source = capture(decoder, positions=True)
    hidden = torch.randn(2, 5, decoder.config.hidden_size)
    kept, wanted = (DynamicCache(config=decoder.config) for _ in range(2))
    for piece in (hidden[:, :3], hidden[:, 3:]):
        found = Mixer(source.mixers[0])(kept, [piece])
        assert torch.equal(found, decoder.layers[0].shift.inner(piece, cache=wanted))
    layers: list[Any] = [kept.layers[0], wanted.layers[0]]
    first, second = (layer.conv_states[0] for layer in layers)
    assert torch.equal(first, second)
    assert not list(Mixer(source.mixers[0]).parameters()), "it owns no tensor of the model"


def test_recorded_arguments_find_their_places() -> None:
    class Said(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return "text", (args, kwargs), torch.zeros(1, 2, 3)

    module = Said()
    seen: dict[str, Any] = {}
    module.register_forward_hook(lambda m, a, k, o: seen.update(args=a, **k), with_kwargs=True)
    leaves, spec = pytree.tree_flatten(((None, 7), {"cache": CacheArgument(), "mask": None}))
    call = MixerCall(module, "said", tuple(leaves), (0, 3), spec, output=-1)
    state, mask = torch.zeros(1, 2, 3), torch.ones(1, 2)
    Mixer(call)("the cache", [state, mask])
    assert seen["args"][0] is state
    assert seen["args"][1] == 7
    assert seen["cache"] == "the cache"
    assert seen["mask"] is mask


def test_a_capture_cache_tells_who_asks_for_a_state() -> None:
    cache = CaptureCache(shifting().config, Recorder())
    assert recurrent_layers(cache) == [0, 2]
    state = torch.zeros(1, 2, 3)
    for ask in (
        lambda: cache.update_conv_state(state, 0),
        lambda: cache.update_recurrent_state(state, 0),
        lambda: cache.get_conv_state(0),
        lambda: cache.get_recurrent_state(0),
        lambda: cache.has_previous_state(0),
    ):
        with pytest.raises(RecurrentAccessError):
            ask()
