"""State dicts, resizing, and memory of a transformed model."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import adept_fx
from adept_fx import ExitConfig
from fresh import EXITS, IDS, fresh, logits
from models import tiny
from oracle import assert_same
from product import rewritten


def cloned(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def shake(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Another model's state."""
    generator = torch.Generator().manual_seed(7)
    return {n: v + 0.1 * torch.randn(v.shape, generator=generator) for n, v in state.items()}


def test_the_state_dict_is_the_originals_and_the_exits_own() -> None:
    model, ee = fresh()
    own = {name for name in ee.state_dict() if name.startswith("adept.")}
    assert own == {f"adept.gates.{i}.{name}" for i in range(2) for name in ("weight", "bias")}
    assert ee.state_dict().keys() - own == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert ee.state_dict()[name].data_ptr() == value.data_ptr(), name


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_loading_state_dicts(assign: bool) -> None:
    model, ee = fresh()
    first, whole, other = cloned(model), cloned(ee), shake(cloned(ee))
    plain = {name: value for name, value in other.items() if not name.startswith("adept.")}
    before = logits(ee)

    ee.load_state_dict(plain, strict=True, assign=assign)  # without the exits' own
    for name, value in ee.state_dict().items():
        assert_same(value, whole[name] if name.startswith("adept.") else plain[name], name)
    changed = logits(ee)
    assert not torch.equal(changed, before)
    twin = tiny("llama", layers=3)
    twin.load_state_dict(plain)
    assert_same(changed, logits(twin), "loaded")

    ee.load_state_dict(other, strict=True, assign=assign)  # with them
    for name, value in ee.state_dict().items():
        assert_same(value, other[name], name)

    ee.load_state_dict(first, assign=assign)
    assert_same(logits(ee), before, "the first state again")
    assert_same(logits(adept_fx.restore(ee)), before, "restored")

    some = {name: value for name, value in other.items() if name != "adept.gates.1.bias"}
    with pytest.raises(RuntimeError, match=r"adept\.gates\.1\.bias"):
        ee.load_state_dict(some, strict=True)
    with pytest.raises(RuntimeError, match="up_proj"):
        ee.load_state_dict({n: v for n, v in first.items() if "up_proj" not in n}, strict=True)
    assert not [name for name in some if name == "adept.gates.1.bias"]
    assert not [name for name in plain if name.startswith("adept.")]  # the argument is left alone
    # The original loads what the transformed model saves.
    missing, unexpected = model.load_state_dict(ee.state_dict(), strict=False)
    assert not missing
    assert all(name.startswith("adept.") for name in unexpected)


def test_the_decoder_and_the_model_share_one_config() -> None:
    """As in the original: what a user sets on `ee.config`, the decoder must see."""
    ee = rewritten("llama")
    assert ee.config is ee.get_decoder().config


def test_resizing_the_vocabulary() -> None:
    model, ee = fresh()
    before = logits(ee)
    size = model.config.vocab_size
    with torch.random.fork_rng(devices=[]):
        ee.resize_token_embeddings(size + 8)
    assert_same(logits(ee)[..., :size], before, "known words")
    new = IDS.clone()
    new[:, 3] = size + 5
    got = logits(ee, new)
    assert got.shape[-1] == size + 8
    assert_same(got, logits(adept_fx.restore(ee), new), "new words")
    # The modules that were replaced are the transformed model's own.
    assert model.config.vocab_size == size
    assert_same(logits(model), before, "original")
    assert ee.config.vocab_size == ee.get_decoder().config.vocab_size == size + 8


def live_bytes() -> int:
    """Of all real tensors that this process holds, each storage once."""
    gc.collect()
    storages: dict[int, int] = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter) and item.device.type == "cpu":
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def held(*parts: Any) -> int:
    storages: dict[int, int] = {}
    for part in parts:
        for tensor in (*part.parameters(), *part.buffers()):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def test_memory_grows_by_less_than_one_percent() -> None:
    shape: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 512, "vocab_size": 1000}
    model = tiny("llama", layers=3, **shape)
    logits(model)
    size, before = held(model), live_bytes()
    ee = adept_fx.transform(model, ExitConfig(exits=EXITS, gate="linear", threshold=0.0))
    for plan in ("auto", "dense", "compact"):
        ee.adept.plan = plan
        logits(ee)
        assert (ee.adept.last_depth <= 1).all()
    assert held(ee, ee.adept.graph) - size < 0.01 * size
    assert live_bytes() - before < 0.01 * size
