"""Looks at what every token would say if it left early."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import adept_fx
from adept_fx.gates.base import Gate, GateInputs


@dataclass(frozen=True)
class Seen:
    """What was seen of ``N`` tokens at ``E`` exit points.

    Attributes:
        agrees: Whether the most likely token is that of the whole model, ``[E, N]`` bool.
        confidence: Probability of the most likely token, ``[E, N]``.
        divergence: KL divergence of the whole model's distribution from that of the exit, in nats,
            ``[E, N]``.
        loss: Negative log-likelihood of the next token of the text, in nats, ``[E, M]`` with
            ``M`` tokens that have a next one.
        final_loss: The same of the whole model, ``[M]``.
    """

    agrees: Tensor
    confidence: Tensor
    divergence: Tensor
    loss: Tensor
    final_loss: Tensor


class _Probe(Gate):
    """Lets nobody go, and compares what every token would say with what it will say."""

    needs = frozenset({"logits"})
    keeps_python_state = True

    def __init__(self) -> None:
        super().__init__()
        self.final = torch.empty(0)
        self.targets = torch.empty(0)
        self.found: dict[str, list[Tensor]] = {}

    def expect(self, final: Tensor, targets: Tensor) -> None:
        """The whole model's log-probabilities ``[S, V]`` and the next tokens ``[S - 1]``."""
        self.final, self.targets = final, targets
        self.found = {name: [] for name in ("agrees", "confidence", "divergence", "loss")}

    def forward(self, tokens: GateInputs) -> Tensor:
        said = F.log_softmax(tokens.need("logits").float(), -1)
        confidence, best = said.max(-1)
        divergence = F.kl_div(said, self.final, reduction="none", log_target=True).sum(-1)
        self.found["agrees"].append(best == self.final.argmax(-1))
        self.found["confidence"].append(confidence.exp())
        self.found["divergence"].append(divergence)
        self.found["loss"].append(F.nll_loss(said[:-1], self.targets, reduction="none"))
        return torch.zeros(said.shape[0], device=said.device)


@torch.no_grad()
def look(model: Any, texts: Iterable[Tensor], exits: tuple[int, ...]) -> Seen:
    """Runs texts through the whole model and past all exit points.

    Args:
        model: A causal language model.
        texts: Token ids, ``[S]`` each, ``S >= 2``.
        exits: Exit points, in layers.
    """
    probe, training = _Probe(), model.training
    model.eval()
    ee = adept_fx.transform(model, adept_fx.ExitConfig(exits=exits, gate=probe))
    ee.adept.plan = "dense"
    parts: list[dict[str, Tensor]] = []
    losses = []
    try:
        for text in texts:
            ids = text.to(model.device)[None]
            final = F.log_softmax(model(ids, use_cache=False).logits[0].float(), -1)
            probe.expect(final, ids[0, 1:])
            ee(ids, use_cache=False, logits_to_keep=1)
            parts.append({name: torch.stack(rows).cpu() for name, rows in probe.found.items()})
            losses.append(F.nll_loss(final[:-1], ids[0, 1:], reduction="none").cpu())
    finally:
        adept_fx.restore(ee)
        model.train(training)
    together = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    return Seen(**together, final_loss=torch.cat(losses))
