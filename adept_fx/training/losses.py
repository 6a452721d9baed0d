"""What gates and exit adapters learn from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_SURE = 1e-6


@dataclass(frozen=True, eq=False)
class Said:
    """What tokens say at an exit point, and what they say in the end.

    Attributes:
        early: Log-probabilities at the exit point, ``[N, V]`` float32.
        final: The same of the whole model.
        targets: What is to be said, ``[N]``; -1 where there is nothing.
    """

    early: Tensor
    final: Tensor
    targets: Tensor

    @property
    def agrees(self) -> Tensor:
        """Whether both find the same most likely, ``[N]`` bool."""
        return self.early.argmax(-1) == self.final.argmax(-1)

    @property
    def divergence(self) -> Tensor:
        """KL divergence of the exit's distribution from the whole model's, in nats, ``[N]``."""
        return F.kl_div(self.early, self.final, reduction="none", log_target=True).sum(-1)

    @property
    def known(self) -> Tensor:
        """Whether there is something to be said, ``[N]`` bool."""
        return self.targets >= 0

    def likelihoods(self) -> tuple[Tensor, Tensor]:
        """Log-likelihood of the target at the exit point and in the end, ``[N]``; 0 if unknown."""
        at = self.targets.clamp(min=0)[:, None]
        early, final = (said.gather(1, at).squeeze(1) for said in (self.early, self.final))
        return early * self.known, final * self.known


def agreement_loss(score: Tensor, agrees: Tensor) -> Tensor:
    """Binary cross entropy in which "yes" and "no" weigh the same, however rare one is.

    The classifier of Schuster et al. 2022 (CALM, arXiv:2207.07061).

    Args:
        score: ``[N]`` in ``[0, 1]``.
        agrees: ``[N]`` bool.
    """
    yes = agrees.float()
    share = yes.mean().clamp(0.02, 0.98)  # a batch without any "no" would blow the other up
    weight = torch.where(agrees, 0.5 / share, 0.5 / (1 - share))
    return _cross_entropy(score, yes, weight)


def preference_loss(
    score: Tensor, gain: Tensor, saved: float, quality_weight: float, compute_weight: float
) -> Tensor:
    """Bradley-Terry preference for leaving over going on (ADEPT, arXiv:2601.03700).

    Args:
        score: ``[N]`` in ``[0, 1]``.
        gain: ``T_exit - T_full``, ``[N]``: mostly below zero.
        saved: ``C_full - C_exit``, the share of the layers that leaving saves.
        quality_weight: Weight of ``gain``.
        compute_weight: Weight of ``saved``.
    """
    target = torch.sigmoid(quality_weight * gain + compute_weight * saved)
    return _cross_entropy(score, target, None)


def _cross_entropy(score: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    # Gates return probabilities, which round to 0 and 1: their logarithm must stay finite. Not by
    # F.binary_cross_entropy, which autocast forbids on CUDA.
    sure = score.float().clamp(_SURE, 1 - _SURE)
    loss = -(target * sure.log() + (1 - target) * (-sure).log1p())
    return (loss if weight is None else loss * weight).sum() / max(len(loss), 1)


def class_loss(said: Said) -> Tensor:
    """Cross entropy with the known classes (DeeBERT, arXiv:2004.12993); 0 if none is known."""
    early, _ = said.likelihoods()
    return -early.sum() / said.known.sum().clamp(min=1)
