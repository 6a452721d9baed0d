"""Errors that leave a model as it was: outputs bit for bit, nothing patched, nothing attached."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

import adept_fx
from adept_fx import AdeptError, ExitConfig

IDS = torch.arange(1, 13).view(2, 6)


def output(model: nn.Module) -> Tensor:
    if isinstance(model, nn.Linear):
        return model(torch.ones(1, model.in_features))
    extra = {"decoder_input_ids": IDS} if getattr(model.config, "is_encoder_decoder", 0) else {}
    return model.eval()(input_ids=IDS, **extra)[0]


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything that a capture patches or might leave behind."""
    found: dict[str, Any] = {
        name: vars(AttentionInterface).get(name) for name in ("get_interface", "__getitem__")
    }
    for module in {sys.modules[type(module).__module__] for module in model.modules()}:
        masks = {k: v for k, v in vars(module).items() if "mask" in k and callable(v)}
        found |= {f"{module.__name__}.{k}": v for k, v in masks.items()}
    for name, child in model.named_modules():
        found[f"{name} class"] = type(child)
        found[f"{name} attributes"] = sorted(vars(child))
        found[f"{name} forward"] = vars(child).get("forward")
        found[f"{name} modules"] = {k: id(v) for k, v in child._modules.items()}
        hooks = (child._forward_hooks, child._forward_pre_hooks)
        found[f"{name} hooks"] = [dict(item) for item in hooks]
        config = getattr(child, "config", None)
        found[f"{name} config"] = (id(config), config.to_dict() if config is not None else None)
    return found


@contextmanager
def intact(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, the model stays as it was, bit for bit."""
    with torch.no_grad():
        before, marks = output(model), traces(model)
        yield
        assert traces(model) == marks
        assert torch.equal(output(model), before)


def refuses(
    model: nn.Module, kind: type[AdeptError], *words: str, act: Callable[[], Any] | None = None
) -> None:
    """`act` (by default: transform) raises that error with these words, the model stays intact."""
    with intact(model), pytest.raises(AdeptError) as caught:
        adept_fx.transform(model, ExitConfig(exits=(1,))) if act is None else act()
    assert type(caught.value) is kind, repr(caught.value)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
