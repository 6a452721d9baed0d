"""The capture: its symbols, its sources, and that it leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from transformers import LlamaModel, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.llama import modeling_llama

from adept_fx.capture import Capture, accepts, capture
from adept_fx.errors import CaptureError, UnsupportedModelError
from adept_fx.graph import meta
from adept_fx.graph.symbols import expression, free_symbols
from adept_fx.intercept import FULL, Recorder, intercepted
from models import tiny, tiny_config

KINDS = ("llama", "gpt_neox", "opt", "gemma3_text", "bloom")


@cache
def decoder_of(kind: str) -> Any:
    return tiny(kind, layers=2).get_decoder()


@cache
def captured(kind: str) -> Capture:
    decoder = decoder_of(kind)
    return capture(decoder, positions=accepts(decoder, "position_ids"))


class Odd(LlamaModel):
    """A Llama decoder that does one thing more."""

    before: Callable[[Any, Tensor], None] | None = None
    after: Callable[[Tensor], Tensor] | None = None

    def forward(self, input_ids: Any = None, **keywords: Any) -> Any:  # type: ignore[override]
        if self.before is not None:
            type(self).before(self, input_ids)  # type: ignore[misc]
        output = super().forward(input_ids=input_ids, **keywords)
        if self.after is not None:
            output.last_hidden_state = type(self).after(output.last_hidden_state)  # type: ignore
        return output


def odd(**methods: Any) -> Any:
    return type("Odd", (Odd,), methods)(tiny_config("llama", 2)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_symbols_are_distinct_and_rows_are_tied_for_bloom_only(kind: str) -> None:
    symbols = captured(kind).symbols
    own = [symbols.batch, symbols.tokens, symbols.past, *symbols.keys]
    assert len(set(own)) == len(own)
    assert (symbols.rows == symbols.batch) == (kind == "bloom")
    assert kind == "bloom" or symbols.rows not in own


def _writes(kind: str) -> list[Node]:
    target = torch.ops.adept_fx.cache_write.default
    return captured(kind).graph.graph.find_nodes(op="call_function", target=target)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_layer_has_one_key_length(kind: str) -> None:
    source = captured(kind)
    lengths: dict[str, set[Any]] = {}
    for node in _writes(kind):
        keys = node.meta["val"][0]
        lengths.setdefault(source.kinds[node.args[3]], set()).add(expression(keys.shape[2]))  # type: ignore[index]
    sliding = {"sliding_attention"} if kind == "gemma3_text" else set()
    assert set(lengths) == {FULL} | sliding
    assert all(len(found) == 1 for found in lengths.values())
    assert len(set.union(*lengths.values())) == len(lengths)
    assert set.union(*lengths.values()) <= source.symbols.keys


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_one_symbol_for_all_kinds_of_layer(kind: str) -> None:
    rows = {expression(node.meta["val"][0].shape[0]) for node in _writes(kind)}
    assert rows == {captured(kind).symbols.rows}


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_the_model_is_found_in_its_module(kind: str) -> None:
    source, decoder = captured(kind), decoder_of(kind)
    known = {id(item) for item in (*decoder.parameters(), *decoder.buffers())}
    inputs = source.graph.graph.find_nodes(op="placeholder")
    called = {"input_ids", "attention_mask", "past", "position_ids"}
    for node in inputs:
        name = meta.get(node).source
        if name is None:
            assert node.name in called or node.name.startswith("slots_"), node.name
            continue
        ref = source.sources[node.name]
        assert ref.name == name
        assert id(ref.get()) in known or "lifted" in name
        assert ref.get().shape == node.meta["val"].shape
    named = {meta.get(node).source for node in inputs}
    assert {name for name, _ in decoder.named_parameters()} <= named


def test_constants_are_resolved() -> None:
    model = odd(after=lambda hidden: hidden * torch.tensor([2.0, 3.0])[1])
    source = capture(model, positions=True)
    constants = [ref for ref in source.sources.values() if "lifted" in ref.name]
    assert [ref.get().tolist() for ref in constants] == [[2.0, 3.0]]


def test_modules_stay_the_truth() -> None:
    model = odd()
    source = capture(model, positions=True)
    (ref,) = (r for r in source.sources.values() if r.name == "layers.1.mlp.up_proj.weight")
    linear: Any = model.get_submodule("layers.1.mlp.up_proj")
    assert ref.get() is linear.weight
    linear.weight = nn.Parameter(torch.zeros_like(linear.weight))
    assert ref.get() is linear.weight
    nn.Module.to(model, torch.bfloat16)
    assert ref.get().dtype == torch.bfloat16
    linear.weight = None
    with pytest.raises(CaptureError, match=r"layers.1.mlp.up_proj.weight was removed"):
        ref.get()


def test_no_gradient_is_traced() -> None:
    assert any(parameter.requires_grad for parameter in decoder_of("llama").parameters())
    for node in captured("llama").graph.graph.nodes:
        assert "grad" not in str(node.target)
        assert not isinstance(v := node.meta.get("val"), Tensor) or not v.grad_fn
    assert torch.is_grad_enabled()


def _state(decoder: Any) -> dict[str, Any]:
    """Everything that a capture could change."""
    modules = {}
    for path, module in decoder.named_modules():
        plain = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        hooks = {k: list(v) for k, v in vars(module).items() if k.endswith("_hooks") and v}
        modules[path] = (type(module), {k: str(v) for k, v in plain.items()}, hooks)
    tensors = (*decoder.named_parameters(), *decoder.named_buffers())
    kept = {name: (id(t), t.data_ptr(), t.requires_grad, t._version) for name, t in tensors}
    return {"modules": modules, "tensors": kept, "config": deepcopy(decoder.config.to_dict())}


def _patchable(decoder: Any) -> dict[str, Any]:
    found = {name: vars(AttentionInterface).get(name) for name in ("get_interface", "__getitem__")}
    found["mask"] = modeling_llama.create_causal_mask is masking_utils.create_causal_mask
    found["embedding"] = vars(decoder.get_input_embeddings()).get("forward")
    found["grad"] = torch.is_grad_enabled()
    return found


def _fail(model: Odd, ids: Tensor) -> None:
    raise ZeroDivisionError("by nothing")


@pytest.mark.parametrize(
    ("methods", "error"),
    [
        ({}, None),
        ({"before": _fail}, r"cannot trace Odd: .*by nothing"),
        ({"after": lambda hidden: hidden[:, : int(hidden.sum())]}, "cannot trace Odd"),
    ],
    ids=["success", "failure at once", "failure at the end"],
)
def test_a_capture_leaves_the_model_as_it_was(methods: Any, error: str | None) -> None:
    model = odd(**methods)
    state, patchable = _state(model), _patchable(model)
    with pytest.raises(CaptureError, match=error) if error else nullcontext():
        capture(model, positions=True)
    assert _state(model) == state
    assert _patchable(model) == patchable


def test_other_threads_call_the_originals() -> None:
    model, recorder = odd(), Recorder()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        wanted = model(ids).last_hidden_state
    chosen = model.config._attn_implementation
    original = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, _fail)
    seen: dict[str, Any] = {}

    def elsewhere() -> None:
        seen["interface"] = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, _fail)
        with torch.no_grad():
            seen["output"] = model(ids).last_hidden_state

    with intercepted(model, recorder):
        here = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, _fail)
        _elsewhere(elsewhere)
    assert hasattr(here, "adept_fx_marker")
    assert seen["interface"] is original
    assert seen["output"].equal(wanted)
    assert (recorder.attentions, recorder.masks, recorder.embeds) == ([], [], 0)


def test_another_model_runs_during_a_capture() -> None:
    other, ids = decoder_of("llama"), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        wanted = other(ids).last_hidden_state
    seen: list[Tensor] = []
    run = torch.no_grad()(lambda: seen.append(other(ids).last_hidden_state))
    capture(odd(before=lambda model, ids: _elsewhere(run)), positions=True)
    assert seen
    assert all(output.equal(wanted) for output in seen)


def _elsewhere(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_an_embedding_that_is_called_twice_is_refused() -> None:
    with pytest.raises(CaptureError, match="embedding was called 2 times"):
        capture(odd(before=lambda model, ids: model.embed_tokens(ids)), positions=True)


def _own_mask(model: Odd, ids: Tensor) -> None:
    table, states = torch.ones(4, dtype=torch.bool), torch.zeros(1, 2, 32)
    own: dict[str, Any] = {"and_mask_function": lambda b, h, q, k: table[q]}
    modeling_llama.create_causal_mask(model.config, states, None, past_key_values=None, **own)


def test_a_mask_with_a_tensor_of_the_models_own_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"create_causal_mask\(and_mask_function=...\)"):
        capture(odd(before=_own_mask), positions=True)


def test_sizes_of_the_call_are_symbols() -> None:
    """No size of the example is baked into the graph."""
    source = captured("llama")
    state: Any = source.graph.graph.output_node().all_input_nodes[0].meta["val"]
    assert free_symbols(state) == {source.symbols.batch, source.symbols.tokens}
    for node in source.graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and meta.get(node).source is None:
            baked = {size for size in value.shape if isinstance(size, int)}
            assert not baked & {3, 5, 7, 12, 17}, node.format_node()
