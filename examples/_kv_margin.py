"""What KV maps are worth: the tokens behind those that left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from _forced import Thresholds
from adept_fx.gates import Replay

_LOGITS = 2**27


@torch.no_grad()
def kv_margin(ee: Any, texts: Tensor, share: float = 0.5) -> dict[str, float]:
    """NLL of tokens that stay, when the others leave at random at the exit nearest half depth.

    Args:
        ee: The rewritten model, with KV maps, not compiled.
        texts: `[rows, columns]`, of which up to 256 rows are read, as many as memory is for.
        share: How many tokens leave.
    """
    adept = ee.adept
    lines = texts.shape[1] * ee.config.get_text_config().vocab_size
    texts = texts[: max(1, min(256, _LOGITS // lines))]
    exits = adept.config.exit_layers
    at = min(range(len(exits)), key=lambda index: abs(exits[index] - adept.num_layers / 2))
    generator = torch.Generator().manual_seed(0)
    leave = torch.rand(texts.shape, generator=generator) < share
    scores = torch.zeros(len(exits), *texts.shape)
    scores[at] = leave.float()
    gates = adept.gate_list()
    adept.set_gates(Replay([scores.to(texts.device)] * 2))
    stays = ~leave[:, :-1].flatten()
    maps = adept.kv_maps.up.detach().clone()

    def nll() -> float:
        logits = ee(texts, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        return float(cross_entropy(logits[stays], texts[:, 1:].flatten()[stays]))

    try:
        with Thresholds(adept, 0.5):
            mapped = nll()
            adept.kv_maps.up.zero_()
            plain = nll()
    finally:
        adept.kv_maps.up.copy_(maps)
        adept.set_gates(gates)
    return {
        "kv_exit": exits[at],
        "kv_nll_maps": mapped,
        "kv_nll_plain": plain,
        "kv_margin": plain - mapped,
    }
