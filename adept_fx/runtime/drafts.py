"""Candidate tokens for gates that ask for ``"draft"``: few rows of the head instead of all."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from adept_fx.errors import GateError, UnsupportedModelError
from adept_fx.gates.base import DRAFT_SIZE

# Of the call in progress: threads may share a model.
CHOSEN: ContextVar[Tensor] = ContextVar("CHOSEN")

_INSTEAD = 'use gate="mlp", or "max_prob" for the whole head'


class Drafts:
    """The candidates of a forward's tokens, and what was last said of them."""

    def __init__(self) -> None:
        self._tokens: Tensor | None = None  # [B * S, DRAFT_SIZE]
        self._logits: Tensor | None = None  # the same shape

    def of(
        self,
        index: Tensor,
        total: int,
        states: Tensor,
        head: Callable[[Tensor], Tensor],
        rows: Callable[[Tensor, Tensor], Tensor],
        logits: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What a gate is given of the candidates.

        Tokens that are live at one exit point were live at those before: what the first one with
        such a gate finds serves all others.

        Args:
            index: Positions ``b * S + s`` of the live tokens, ``[N]``.
            total: ``B * S``.
            states: Their states, ``[N, D]``.
            head: Maps states to logits ``[N, V]``.
            rows: Maps states and candidates ``[N, k]`` to the logits of those.
            logits: Their logits ``[N, V]``, if somebody computed them.

        Raises:
            GateError: The model tells fewer classes apart than there are candidates.
        """
        if self._tokens is None or self._logits is None:
            whole = head(states) if logits is None else logits
            if whole.shape[-1] < DRAFT_SIZE:
                raise GateError(
                    f"a gate on {DRAFT_SIZE} candidate tokens was given {whole.shape[-1]} classes",
                    hint=_INSTEAD,
                )
            now, chosen = whole.topk(DRAFT_SIZE, dim=-1)
            before = now
            self._tokens = chosen.new_zeros(total, DRAFT_SIZE).index_copy(0, index, chosen)
            self._logits = now.new_zeros(total, DRAFT_SIZE).index_copy(0, index, now)
        else:
            chosen, before = self._tokens[index], self._logits[index]
            now = rows(states, chosen)
            self._logits = self._logits.index_copy(0, index, now)
        return {"draft": now, "draft_previous": before, "draft_tokens": chosen}


class Rows(nn.Module):
    """Takes the place of a model's output embedding: computes the logits in ``CHOSEN`` only.

    Args:
        embedding: The output embedding. It is referenced, not registered.
    """

    def __init__(self, embedding: nn.Linear) -> None:
        super().__init__()
        self._embedding = [embedding]

    @property
    def weight(self) -> Tensor:
        """The whole weight: forwards read its dtype."""
        return self._embedding[0].weight

    def forward(self, hidden: Tensor) -> Tensor:
        """From ``[N, 1, D]`` to ``[N, 1, DRAFT_SIZE]``."""
        chosen, bias = CHOSEN.get(), self._embedding[0].bias
        logits = torch.einsum("nsd,nkd->nsk", hidden, self.weight[chosen])
        return logits if bias is None else logits + bias[chosen].unsqueeze(1)


def output_embedding(model: nn.Module) -> nn.Linear:
    """The model's output embedding, if rows of it can be computed one by one.

    Raises:
        UnsupportedModelError: It is no plain linear layer.
    """
    find: Any = getattr(model, "get_output_embeddings", None)
    try:
        found = find() if callable(find) else None
    except (AttributeError, NotImplementedError):
        found = None
    why = _not_plain(found)
    if why is not None:
        raise UnsupportedModelError(
            f"the gate asks for a few rows of the head, but {type(model).__name__}'s output "
            f"embedding {why}",
            hint=_INSTEAD,
        )
    plain: Any = found
    return plain  # type: ignore[no-any-return]


def _not_plain(module: Any) -> str | None:
    if module is None:
        return "is missing"
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, not a plain nn.Linear"
    weight = module.weight
    if type(weight) not in (Tensor, nn.Parameter):
        return f"keeps its weight as {type(weight).__name__}"
    if not weight.is_floating_point():
        return f"keeps its weight in {weight.dtype}"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return "has hooks, or a forward of its own"
    return None


def disagree(rows: Tensor, whole: Tensor, chosen: Tensor) -> bool:
    """Whether logits computed row by row are others than those of the whole head.

    Args:
        rows: Logits of the candidates, ``[N, k]``.
        whole: All logits, ``[N, V]``.
        chosen: The candidates, ``[N, k]``.
    """
    if rows.shape != chosen.shape:
        return True
    expected = whole.gather(1, chosen).float()
    # Sums in another order, and in low precision a rounding or two more.
    allowed = max(1e-3, 8 * torch.finfo(whole.dtype).eps) * expected.abs().amax()
    return bool(((rows.float() - expected).abs() > allowed).any())
