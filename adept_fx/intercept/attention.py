"""Attention functions as markers."""

import inspect
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from adept_fx.intercept.recorder import Recorder, replace
from adept_fx.ops.attention import AttentionCall


def patch_attention(stack: ExitStack, recorder: Recorder, thread: int) -> None:
    """Makes the registry hand out markers to the capturing thread."""
    choose: Callable[..., Any] = AttentionInterface.get_interface
    lookup: Callable[..., Any] = AttentionInterface.__getitem__

    def get_interface(self: Any, implementation: str, default: Callable[..., Any]) -> Any:
        chosen = choose(self, implementation, default)
        return _attention_marker(chosen, recorder) if threading.get_ident() == thread else chosen

    def getitem(self: Any, key: str) -> Any:
        chosen = lookup(self, key)
        return _attention_marker(chosen, recorder) if threading.get_ident() == thread else chosen

    replace(stack, AttentionInterface, "get_interface", get_interface)
    replace(stack, AttentionInterface, "__getitem__", getitem)


def _attention_marker(chosen: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    if hasattr(chosen, "adept_fx_marker"):
        return chosen
    named = inspect.signature(chosen).parameters

    def marker(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **keywords: Any,
    ) -> tuple[Tensor, None]:
        # Kernels that take packed sequences read position_ids from **kwargs; the others swallow it.
        if "position_ids" not in named and "flash" not in getattr(chosen, "__name__", ""):
            keywords.pop("position_ids", None)
        tensors = {name: item for name, item in keywords.items() if isinstance(item, Tensor)}
        static = {name: item for name, item in keywords.items() if name not in tensors}
        recorder.attentions.append(AttentionCall(chosen, module, static, tuple(tensors)))
        output = torch.ops.adept_fx.attention(
            query,
            key,
            value,
            attention_mask,
            list(tensors.values()),
            len(recorder.attentions) - 1,
        )
        return output, None

    marker.adept_fx_marker = True  # type: ignore[attr-defined]
    return marker
