"""A transformed model is an `nn.Module` as its user expects: dtype, mode, gradients, copies."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import adept_fx
from adept_fx import ExitConfig
from adept_fx.gates import Replay
from fresh import EXITS, IDS, LAYERS, PADDED, POSITIONS, fresh, logits
from models import tiny
from oracle import Oracle, assert_close, assert_same

WANTS = torch.rand(2, 2, 7, generator=torch.Generator().manual_seed(5)) > 0.6


def test_the_original_is_not_mutated() -> None:
    model = tiny("llama", layers=LAYERS)
    config, generation = model.config, model.generation_config
    texts = config.to_json_string(), generation.to_json_string()
    modules, before = dict(model.named_modules()), logits(model)
    states = {name: (sorted(vars(m)), dict(m._modules)) for name, m in modules.items()}
    ee = adept_fx.transform(model, ExitConfig(exits=EXITS, gate=Replay([WANTS.float()])))
    logits(ee)
    assert type(ee) is type(model)
    assert type(ee.get_decoder()) is type(model.get_decoder())
    assert dict(model.named_modules()) == modules
    assert {n: (sorted(vars(m)), dict(m._modules)) for n, m in modules.items()} == states
    assert (model.config, model.generation_config) == (config, generation)
    assert (config.to_json_string(), generation.to_json_string()) == texts
    assert model.model.config is model.config is config
    assert_same(logits(model), before, "original after the transform")

    assert ee.config is not config
    assert ee.generation_config is not generation
    assert (ee.config.to_json_string(), ee.generation_config.to_json_string()) == texts
    assert {id(p) for p in model.parameters()} == {id(p) for p in ee.parameters()}
    assert {id(b) for b in model.buffers()} == {id(b) for b in ee.buffers()}

    back = adept_fx.restore(ee)
    assert type(back) is type(model)
    assert sorted(vars(back)) == sorted(vars(model))
    assert sorted(vars(back.model)) == sorted(vars(model.model))
    assert [name for name, _ in back.named_modules()] == list(modules)
    assert all(back.get_submodule(n) is m for n, m in modules.items() if n not in ("", "model"))
    assert_same(logits(back), before, "restored")
    with pytest.raises(adept_fx.AdeptError):
        adept_fx.restore(back)


@pytest.mark.parametrize("which", ["original", "transformed"])
def test_switching_the_attention_implementation(which: str) -> None:
    model, ee = fresh()
    before = logits(model)
    (model if which == "original" else ee).set_attn_implementation("eager")
    assert_close(logits(ee), before, f"eager set on the {which}: transformed")
    assert_close(logits(model), before, f"eager set on the {which}: original")
    if which == "transformed":
        eager = tiny("llama", layers=LAYERS, attn_implementation="eager")
        assert_same(logits(ee), logits(eager), "eager set on the transformed: bit for bit")


def test_bfloat16_and_back() -> None:
    model, ee = fresh()
    graph = ee.adept.graph
    ee.to(torch.bfloat16)
    assert {p.dtype for p in ee.parameters()} == {torch.bfloat16}
    got = logits(ee)
    assert got.dtype == torch.bfloat16
    assert_same(got, logits(model), "bfloat16")
    assert ee.adept.graph is not graph
    model.to(torch.float32)
    ee.adept.to(torch.float32)
    assert_same(logits(ee), logits(model), "float32 again")
    gate = Replay([WANTS.float()])
    ee.adept.set_gates(gate)
    ee.adept.thresholds = 0.5
    with Oracle(model, EXITS).exits_for(WANTS & PADDED.bool(), PADDED.bool()):
        want = logits(model)
    assert_close(logits(ee), want, "exits after the round trip")


def test_train_and_eval() -> None:
    model, ee = fresh(attention_dropout=0.5)
    quiet = logits(model)
    assert ee.train() is ee
    assert ee.training
    assert ee.adept.training
    assert model.model.layers[0].training
    model.train()
    outputs = []
    for each in (ee, model, ee):
        torch.manual_seed(0)
        outputs.append(each(IDS, attention_mask=PADDED, position_ids=POSITIONS).logits.detach())
    assert_same(outputs[0], outputs[1], "dropout with one seed")
    assert_same(outputs[0], outputs[2], "dropout with one seed, again")
    assert not torch.equal(outputs[0][PADDED.bool()], quiet)
    ee.eval()
    model.eval()
    assert not ee.adept.training
    assert_same(logits(ee), quiet, "eval again")


def test_gradients() -> None:
    """They are the oracle's, and a token that left teaches no later layer by its own loss."""
    model, ee = fresh(gate=Replay([WANTS.float()] * 2), threshold=0.5)
    ee.adept.plan = "auto"  # training asks for the dense one by itself
    twin = copy.deepcopy(model).train()
    ee.train()
    real = torch.ones_like(WANTS[0])
    inputs = {"position_ids": POSITIONS, "labels": IDS}
    with Oracle(twin, EXITS).exits_for(WANTS, real) as exits:
        want = twin(IDS, **inputs)
    want.loss.backward()
    got = ee(IDS, **inputs)
    got.loss.backward()
    assert torch.equal(ee.adept.last_depth, exits.depth)
    assert_close(got.loss.detach()[None], want.loss.detach()[None], "loss")
    twins = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert_close(parameter.grad, twins[name].grad, f"gradient of {name}")

    model.zero_grad()
    out = ee(IDS, position_ids=POSITIONS).logits
    gone = ee.adept.last_depth == EXITS[0]
    assert gone.any()
    out[gone].pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        layer = int(name.split(".")[2]) if "layers" in name else -1
        assert moved == (layer < EXITS[0]), name


def test_deep_copies_are_independent() -> None:
    model, ee = fresh(gate=Replay([WANTS.float()] * 9), threshold=0.5)
    before, plain = logits(ee), logits(model)
    ee.adept.gates[0].reset()
    twin = copy.deepcopy(ee)
    assert type(twin) is type(ee)
    assert twin.adept is not ee.adept
    assert twin.adept.decoder is twin.get_decoder()
    assert ee.adept.decoder is ee.get_decoder()
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in ee.parameters()}
    assert_same(logits(twin), before, "copy")
    assert twin.adept.stats.total != ee.adept.stats.total
    with torch.no_grad():
        twin.model.layers[0].mlp.up_proj.weight.mul_(-2)
        twin.model.norm.weight.add_(1)
    twin.adept.thresholds = 1.0
    assert not torch.equal(logits(twin), plain)
    assert_same(logits(twin), logits(adept_fx.restore(twin)), "changed copy")
    assert ee.adept.thresholds == (0.5, 0.5)
    assert_same(logits(ee), before, "transformed model after its copy changed")
    assert_same(logits(model), plain, "original after the copy changed")


class Doubled(nn.Module):
    """What an adapter library puts in the place of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.delta = nn.Parameter(torch.full((base.out_features, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x.sum(-1, keepdim=True) * self.delta.T


def test_a_replaced_layer_is_seen() -> None:
    model, ee = fresh()
    before, mlp = logits(ee), ee.model.layers[1].mlp
    linear = mlp.up_proj
    mlp.up_proj = Doubled(linear)
    changed = logits(ee)
    assert not torch.equal(changed, before)
    assert_same(changed, logits(model), "adapter")
    mlp.up_proj = linear
    assert_same(logits(ee), before, "adapter removed")
