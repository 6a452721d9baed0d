"""What gates and exits are trained on: the states of a forward in which nobody leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from adept_fx.gates.base import Gate, GateInputs
from adept_fx.runtime.handle import Adept


@dataclass(frozen=True, eq=False)
class Observation:
    """``N`` tokens at all exit points, and behind the last layer.

    Attributes:
        inputs: What each exit's gate sees of the tokens.
        final: What the head is given of them in the end, ``[N, D]``.
        targets: What is to be said: the next token of the text, or the class of the row; -1 where
            there is none. ``[N]``.
    """

    inputs: tuple[GateInputs, ...]
    final: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Observation:
        """The same on another device."""
        inputs = tuple(_each(item, lambda value: value.to(device)) for item in self.inputs)
        return Observation(inputs, self.final.to(device), self.targets.to(device))

    def pick(self, chosen: Tensor) -> Observation:
        """Some of the tokens: ``chosen [M]`` are their numbers."""
        inputs = tuple(_each(item, lambda value: value[chosen]) for item in self.inputs)
        return Observation(inputs, self.final[chosen], self.targets[chosen])


def _each(inputs: GateInputs, change: Callable[[Tensor], Tensor]) -> GateInputs:
    """Gate inputs with all their tensors, which have an entry per token, changed."""
    values = {name: getattr(inputs, name) for name in GateInputs.__dataclass_fields__}
    tensors: Any = {name: change(v) for name, v in values.items() if isinstance(v, Tensor)}
    return replace(inputs, **tensors)


class _Recorder(Gate):
    """Lets nobody go, and keeps what the real gate would have been given."""

    keeps_python_state = True

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        # Logits are made later, of the tokens that are kept.
        self.needs = gate.needs - {"logits"}
        self.seen: list[GateInputs] = []

    def forward(self, tokens: GateInputs) -> Tensor:
        self.seen.append(tokens)
        return tokens.hidden.new_zeros(tokens.hidden.shape[0], dtype=torch.float32)


@contextmanager
def other_gates(adept: Adept, gates: Sequence[Gate], threshold: float) -> Iterator[None]:
    """Puts gates in the place of those that there are, in the dense plan."""
    kept, plan = adept.gates, adept.plan
    thresholds = adept._thresholds, adept._prefill_thresholds
    count = len(gates)
    try:
        adept.gates, adept.plan = nn.ModuleList(gates), "dense"
        adept._thresholds = adept._prefill_thresholds = (threshold,) * count
        yield
    finally:
        adept.gates, adept.plan = kept, plan
        adept._thresholds, adept._prefill_thresholds = thresholds


@contextmanager
def last_states(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """Keeps what the decoder returns, ``[B, S, D]``: all that the head is given."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    handle = decoder.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def observe(ee: Any, batch: dict[str, Tensor], *, tokens: int, seed: Tensor | None) -> Observation:
    """Runs texts through the whole model, past all exit points.

    Args:
        ee: The rewritten model.
        batch: ``input_ids`` and ``attention_mask``, ``[B, S]``, padded on the right; of a
            classifier ``labels [B]``, too.
        tokens: How many tokens to keep at most.
        seed: Random numbers ``[B * S]`` that choose among more; None for the first.

    Returns:
        Of a language model all tokens, or some; of a classifier the one that each row's class is
        read from.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    classes = classifies(ee)
    recorders = [_Recorder(gate) for gate in ee.adept.gate_list()]
    decoder = ee.adept.decoder
    with other_gates(ee.adept, recorders, threshold=1.0), last_states(decoder) as states:
        decoder(input_ids=ids, attention_mask=mask, use_cache=False)
    final = states[0].flatten(0, 1)
    inputs = [recorder.seen[0] for recorder in recorders]
    place = inputs[0].batch_index * ids.shape[1] + inputs[0].token_index
    if classes:
        targets = batch.get("labels", torch.full_like(ids[:, 0], -1))
        pooled = ee.adept.pooled_tokens(input_ids=ids, attention_mask=mask)
        everything = targets[:, None].expand(ids.shape).flatten()
        chosen = pooled.flatten()[place].nonzero().squeeze(1)
    else:
        everything = _next_tokens(ids, mask).flatten()
        chosen = torch.arange(len(place), device=place.device)
        if len(chosen) > tokens:
            order = chosen if seed is None else seed.to(place.device)[: len(place)].argsort()
            chosen = order[:tokens].sort().values
    whole = Observation(tuple(inputs), final[place], everything[place])
    return whole.pick(chosen)


def classifies(ee: Any) -> bool:
    """Whether the model gives one result per row."""
    pools: bool = ee.adept.pools
    return pools


def _next_tokens(ids: Tensor, mask: Tensor) -> Tensor:
    following = ids.roll(-1, 1).masked_fill(mask.roll(-1, 1) == 0, -1)
    following[:, -1] = -1
    return following
