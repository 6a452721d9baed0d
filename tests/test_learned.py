"""Exit adapters and KV maps, against hooks on the original: design section 2, points 3 and 5."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adept_fx
from adept_fx import ExitConfig
from adept_fx.errors import ConfigError
from adept_fx.gates import MaxProb, Replay
from adept_fx.low_rank import ExitAdapter
from models import tiny
from oracle import Exits, Oracle, assert_cache_equal, assert_close

EXITS = (1, 3)
LAYERS = 4
# Rows of two lengths, padded on the left: a prompt, then two single tokens.
IDS = torch.randint(3, 90, (3, 8), generator=torch.Generator().manual_seed(0))
REAL = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8, [0, 1, 1, 1, 1, 1, 1, 1]]).bool()
CALLS = ((0, 6), (6, 7), (7, 8))
KINDS = ("map", "map_per_layer")


def _scores(seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(len(EXITS), 3, end - start, generator=generator) for start, end in CALLS]


def _randomize(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.2, generator=generator)


def _rewritten(model: Any, kv: str, adapter_rank: int = 3) -> Any:
    config = ExitConfig(
        exits=EXITS, gate=Replay(_scores()), threshold=0.5, kv=kv, kv_rank=2,
        adapter_rank=adapter_rank,
    )  # fmt: skip
    ee = adept_fx.transform(model, config)
    _randomize(ee.adept, 5)
    return ee


class LearnedOracle(Oracle):
    """Layers see mapped states of tokens that left; the final norm sees adapted ones."""

    def __init__(self, model: Any, adept: Any) -> None:
        super().__init__(model, EXITS)
        self.adept = adept

    @contextmanager
    def exits_for(self, wants: Tensor, real: Tensor) -> Iterator[Exits]:
        with super().exits_for(wants, real) as exits:
            handles = [
                layer.register_forward_pre_hook(self._mapper(exits, index))
                for index, layer in enumerate(self.layers)
            ]
            handles.append(self.layers[-1].register_forward_hook(self._adapter(exits)))
            try:
                yield exits
            finally:
                for handle in handles:
                    handle.remove()

    def _mapper(self, exits: Exits, layer: int) -> Any:
        def hook(module: nn.Module, args: Any) -> Any:
            hidden = args[0].clone()
            maps = self.adept.kv_maps
            for at, left in enumerate(EXITS):
                if maps is not None and left <= layer:
                    which = layer - EXITS[0] if maps.down.shape[1] > 1 else 0
                    down, up = maps.down[at, which], maps.up[at, which]
                    chosen = exits.depth == left
                    hidden[chosen] += (args[0][chosen] @ down.T) @ up.T
            return (hidden, *args[1:])

        return hook

    def _adapter(self, exits: Exits) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            for at, left in enumerate(EXITS):
                if self.adept.adapters:
                    chosen = exits.depth == left
                    adapter = self.adept.adapters[at]
                    hidden[chosen] += (hidden[chosen] @ adapter.down.T) @ adapter.up.T
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook


def _play(model: Any, inside: Any) -> tuple[list[Tensor], Any]:
    cache, found = None, []
    for at, (start, end) in enumerate(CALLS):
        mask = REAL[:, :end].long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
        with inside(at), torch.no_grad():
            output = model(
                IDS[:, start:end],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
        cache = output.past_key_values
        found.append(output.logits[REAL[:, start:end]])
    return found, cache


@contextmanager
def _nothing(at: int) -> Iterator[None]:
    yield


@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize("model_type", ["llama", pytest.param("gpt_neox", marks=pytest.mark.slow)])
def test_plans_equal_the_oracle(model_type: str, kv: str) -> None:
    model = tiny(model_type)
    ee = _rewritten(model, kv)
    oracle = LearnedOracle(model, ee.adept)
    scores = _scores()

    def wanted(at: int) -> Any:
        return oracle.exits_for(scores[at] > 0.5, REAL[:, CALLS[at][0] : CALLS[at][1]])

    want, want_cache = _play(model, wanted)
    for plan in ("dense", "compact", "auto", "compiled"):
        if plan == "compiled":
            ee.adept.compile(backend="eager")
        else:
            ee.adept.plan = plan
        ee.adept.gates[0].reset()
        got, cache = _play(ee, _nothing)
        for at, (mine, theirs) in enumerate(zip(got, want, strict=True)):
            assert_close(mine, theirs, f"{plan}, call {at}")
        assert_cache_equal(cache, want_cache, REAL, plan)


def test_new_ones_change_nothing() -> None:
    model = tiny("llama")
    plain = adept_fx.transform(model, ExitConfig(EXITS, Replay(_scores()), 0.5))
    config = ExitConfig(EXITS, Replay(_scores()), 0.5, kv="map", adapter_rank=3)
    learned = adept_fx.transform(model, config)
    for ours, theirs in zip(_play(learned, _nothing)[0], _play(plain, _nothing)[0], strict=True):
        assert_close(ours, theirs, "identity")


def test_at_threshold_one_they_are_not_there() -> None:
    model = tiny("llama")
    ee = _rewritten(model, "map")
    ee.adept.thresholds, ee.adept.plan = 1.0, "dense"
    ee.adept.set_gates(MaxProb())
    with torch.no_grad():
        assert torch.equal(ee(IDS).logits, model(IDS).logits)


def test_gates_see_logits_behind_the_adapter() -> None:
    model = tiny("llama")
    config = ExitConfig(EXITS, "max_prob", adapter_rank=3)
    ee = adept_fx.transform(model, config)
    _randomize(ee.adept.adapters, 3)
    seen = []
    gate = ee.adept.gates[1]
    gate.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        ee(IDS)
        adapted = ee.adept.adapters[1](seen[0].hidden)
        want = model.lm_head(model.model.norm(adapted))
    assert_close(seen[0].logits, want, "early logits")


@pytest.mark.parametrize("kv", KINDS)
def test_gradients_reach_them_and_nothing_else(kv: str) -> None:
    model = tiny("llama").requires_grad_(False)
    ee = _rewritten(model, kv)
    ee.adept.plan = "dense"
    loss = ee(IDS[:, :6], use_cache=False).logits.square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ee.adept.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_they_are_in_the_state_dict_and_follow_the_model() -> None:
    model = tiny("llama")
    ee = _rewritten(model, "map_per_layer")
    names = {name for name in ee.state_dict() if name.startswith("adept.")}
    adapters = {f"adept.adapters.{at}.{part}" for at in (0, 1) for part in ("down", "up")}
    assert names == adapters | {"adept.kv_maps.down", "adept.kv_maps.up"}
    assert ee.adept.kv_maps.down.shape == (2, 3, 2, model.config.hidden_size)
    before = _play(ee, _nothing)[0]
    ee.to(torch.bfloat16)
    ee.adept.gates[0].reset()
    after = _play(ee, _nothing)[0]
    assert after[0].dtype == torch.bfloat16
    assert ee.adept.kv_maps.down.dtype == torch.bfloat16
    assert (before[0] - after[0].float()).abs().max() < 0.2 * before[0].abs().max()


def test_the_graph_shows_them() -> None:
    ee = _rewritten(tiny("llama"), "map")
    assert "adapt_exits" in ee.adept.graph.code
    assert "map_tokens" in ee.adept.graph.stage_1.graph.code
    plain = adept_fx.transform(tiny("llama"), ExitConfig(EXITS))
    assert "adapt_exits" not in plain.adept.graph.code
    assert "map_tokens" not in plain.adept.graph.stage_1.graph.code


def test_ranks_are_checked() -> None:
    for wrong in ({"kv_rank": 0}, {"kv_rank": 1.5}, {"adapter_rank": -1}, {"adapter_rank": True}):
        with pytest.raises(ConfigError, match="must be a whole number"):
            ExitConfig(**wrong)  # type: ignore[arg-type]


def test_an_adapter_is_computed_in_the_dtype_of_its_input() -> None:
    adapter = ExitAdapter(8, 2, dtype=torch.float32)
    nn.init.normal_(adapter.up)
    assert adapter(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
