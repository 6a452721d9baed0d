"""Trains the model itself to be left early: the recipe of LayerSkip, through LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import set_seed
from transformers.pytorch_utils import Conv1D

from adept_fx.errors import ConfigError
from adept_fx.training.config import FitConfig
from adept_fx.training.logged import Logged


class Backbone(Logged):
    """A model with LoRA in its linear layers; its forward is the loss of last layer and exits.

    Layer dropout leaves a layer out for some of the texts, the last one most often
    (``p_l = p (e^(l ln 2 / (L - 1)) - 1)``). The early exit loss is that of one exit point per
    step, in turn, through the model's own norm and head (Elhoushi et al. 2024, arXiv:2404.16710).

    Args:
        model: The plain model.
        ee: The rewritten one, whose exit points and head are meant.
        config: How to train.
    """

    def __init__(self, model: nn.Module, ee: Any, config: FitConfig) -> None:
        super().__init__()
        # Checkpoints hold LoRA alone: the model is no child.
        self.lora = nn.ParameterList(p for p in model.parameters() if p.requires_grad)
        self._model = (model,)
        self._ee = (ee,)
        self._config = config
        self._layers = (layers_of(ee),)
        self._generator = torch.Generator().manual_seed(config.seed)
        self._steps = 0

    def train(self, mode: bool = True) -> Backbone:
        """Dropout that the model has of its own is on in training."""
        self._model[0].train(mode)
        return super().train(mode)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, **others: Any
    ) -> dict[str, Tensor]:
        """The loss on texts padded on the right, ``[B, S]``."""
        exits = self._ee[0].adept.config.exit_layers
        at = self._steps % len(exits)
        self._steps += 1
        with self._hooks(exits[at], len(input_ids)) as states:
            output = self._model[0](
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            )
        targets = self._targets(input_ids, attention_mask, others.get("labels"))
        last = _loss(output.logits, targets)
        early = _loss(self._early(states[0], output.logits, input_ids, attention_mask, at), targets)
        for name, value in (("last_loss", last), (f"early_loss_{exits[at]}", early)):
            self.note(name, float(value.detach()))
        return {"loss": last + self._config.early_exit_weight * early}

    def _early(
        self, hidden: Tensor, logits: Tensor, ids: Tensor, mask: Tensor, exit_index: int
    ) -> Tensor:
        adept = self._ee[0].adept
        if not adept.pools:
            return adept.early_logits(hidden.flatten(0, 1), exit_index).view_as(logits)  # type: ignore[no-any-return]
        pooled = adept.pooled_tokens(input_ids=ids, attention_mask=mask)
        return adept.early_logits(hidden[pooled], exit_index)  # type: ignore[no-any-return]

    def _targets(self, ids: Tensor, mask: Tensor, labels: Tensor | None) -> Tensor:
        if labels is not None:
            return labels
        following = ids.roll(-1, 1).masked_fill(mask.roll(-1, 1) == 0, -100)
        following[:, -1] = -100
        return following

    @contextmanager
    def _hooks(self, exit_layer: int, rows: int) -> Iterator[list[Tensor]]:
        """Drops layers, and keeps the state behind the first ``exit_layer`` of them."""
        layers = self._layers[0]
        states: list[Tensor] = []
        handles = []
        for number, layer in enumerate(layers, start=1):
            chance = self._config.layer_dropout * dropout_share(number - 1, len(layers))
            left_out = torch.rand(rows, generator=self._generator) < chance
            kept = states if number == exit_layer else None
            handles.append(layer.register_forward_hook(_hook(left_out, kept), with_kwargs=True))
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()


def dropout_share(layer: int, layers: int) -> float:
    """Share of the largest chance at a layer: 0 at the first, 1 at the last."""
    return float(2.0 ** (layer / max(layers - 1, 1)) - 1.0)


def _hook(left_out: Tensor, kept: list[Tensor] | None) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        chosen = left_out.to(after.device)[:, None, None]
        after = torch.where(chosen, before, after) if left_out.any() else after
        if kept is not None:
            kept.append(after)
        return (after, *output[1:]) if isinstance(output, tuple) else after

    return hook


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.ndim == 3:
        logits, targets = logits.flatten(0, 1), targets.flatten()
    return F.cross_entropy(logits.float(), targets)


def layers_of(ee: Any) -> Sequence[nn.Module]:
    """The modules that are the model's layers, in order.

    Raises:
        ConfigError: They are not the members of one list.
    """
    container = ee.adept.container
    found = ee.adept.decoder.get_submodule(container) if container else None
    if not isinstance(found, nn.ModuleList) or len(found) != ee.adept.num_layers:
        raise ConfigError(
            f"the layers of {type(ee).__name__} are not the members of one list: none can be left "
            "out by a hook",
            hint="leave backbone=None: gates, adapters and KV maps need no such list",
        )
    return list(found)


def check_backbone(ee: Any) -> None:
    """Raises if LoRA and layer dropout find no place in the model.

    Raises:
        ConfigError: Its layers are not the members of one list, have no linear layers, or hold
            adapters already, which a merge would take along.
    """
    inner = {module for layer in layers_of(ee) for module in layer.modules()}
    if any(hasattr(module, "base_layer") for module in inner):
        raise ConfigError(
            f"{type(ee).__name__} has adapters of PEFT in its layers",
            hint="merge them first (merge_and_unload), then transform",
        )
    if not _linear_names(ee, ee):
        raise ConfigError(f"the layers of {type(ee).__name__} hold no linear layers for LoRA")


def _linear_names(model: nn.Module, ee: Any) -> list[str]:
    inner = {module for layer in layers_of(ee) for module in layer.modules()}
    named = model.named_modules()
    return [name for name, m in named if m in inner and isinstance(m, (nn.Linear, Conv1D))]


@contextmanager
def lora(model: Any, ee: Any, config: FitConfig) -> Iterator[nn.Module]:
    """The model with LoRA in the linear layers of its layers.

    It is merged into the weights at the end, and taken out again if the training fails: a second
    try starts from the same weights.

    Args:
        model: The plain model.
        ee: The rewritten one, whose layers it shares.
        config: How to train.
    """
    from peft import LoraConfig, get_peft_model

    names = _linear_names(model, ee)
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank,
        target_modules=names,
        fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
    )
    set_seed(config.seed)  # LoRA begins at random
    wrapped: Any = get_peft_model(model, settings)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:  # half precision would round the steps of an optimizer away
            parameter.data = parameter.data.float()
    try:
        yield wrapped
    except BaseException:
        wrapped.unload()
        raise
    wrapped.merge_and_unload()
