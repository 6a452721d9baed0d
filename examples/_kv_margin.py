"""What KV maps are worth: the tokens behind those that left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from adept_fx.gates import Replay


@torch.no_grad()
def kv_margin(ee: Any, texts: Tensor, exit_layer: int, share: float = 0.5) -> dict[str, float]:
    """NLL of tokens that stay, when the others leave at random at one exit point.

    Args:
        ee: The rewritten model, with KV maps, not compiled.
        texts: `[rows, columns]`.
        exit_layer: Index of the exit point.
        share: How many tokens leave.
    """
    adept = ee.adept
    exits = len(adept.config.exit_layers)
    generator = torch.Generator().manual_seed(0)
    leave = torch.rand(texts.shape, generator=generator) < share
    scores = torch.zeros(exits, *texts.shape)
    scores[exit_layer] = leave.float()
    gates = adept.gate_list()
    before = adept.thresholds, adept.prefill_thresholds
    adept.set_gates(Replay([scores.to(texts.device)] * 2))
    adept.thresholds = adept.prefill_thresholds = 0.5
    stays = ~leave[:, :-1].flatten()
    maps = adept.kv_maps.up.detach().clone()

    def nll() -> float:
        logits = ee(texts, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        return float(cross_entropy(logits[stays], texts[:, 1:].flatten()[stays]))

    try:
        mapped = nll()
        adept.kv_maps.up.zero_()
        plain = nll()
    finally:
        adept.kv_maps.up.copy_(maps)
        adept.set_gates(gates)
        adept.thresholds, adept.prefill_thresholds = before
    return {"kv_nll_maps": mapped, "kv_nll_plain": plain, "kv_margin": plain - mapped}
