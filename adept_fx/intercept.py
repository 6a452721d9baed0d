"""Makes the decoder's calls into transformers' registries visible to a trace.

While a decoder is captured, and only for the capturing thread:

- ``AttentionInterface`` hands out a marker in place of the attention function that the model
  chose; the chosen function is recorded and called at run time;
- the mask functions (``create_causal_mask`` and relatives) that the model's module imported are
  replaced by a marker; the real one is called at run time with the call's own cache and mask;
- the input embedding's output is marked, so that the graph can start from ``inputs_embeds``.

Everything is put back when the context closes.
"""

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, masking_utils
from transformers.modeling_utils import AttentionInterface

from adept_fx.errors import UnsupportedModelError
from adept_fx.ops.attention import AttentionCall

FULL = "full_attention"
_LOCK = threading.RLock()


@dataclass
class MaskCall:
    """One recorded mask: ``function(**keywords)`` with the call's own tensors filled in.

    ``key`` is the name under which transformers passes such a mask in a dict of masks.
    ``inputs`` names the arguments that come from the call (``attention_mask``, ...).
    """

    function: Callable[..., Any]
    key: str
    keywords: dict[str, Any]
    inputs: frozenset[str]


@dataclass
class Recorder:
    """What one capture recorded: attention calls, mask calls, the probes for key lengths."""

    slots: dict[str, Tensor] = field(default_factory=dict)
    past: Tensor | None = None
    attentions: list[AttentionCall] = field(default_factory=list)
    masks: list[MaskCall] = field(default_factory=list)
    embeds: int = 0
    output_type: type | None = None

    def slots_of(self, kind: str) -> Tensor:
        """The probe whose symbol is the key length of layers of ``kind``."""
        return self.slots.get(kind, self.slots[FULL])


class CaptureCache(DynamicCache):
    """A cache whose updates appear in the trace as ``adept_fx::cache_write``."""

    def __init__(self, config: Any, recorder: Recorder) -> None:
        super().__init__(config=config)
        self.recorder = recorder
        self.kinds = cache_kinds(config, self)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Records the write; see ``adept_fx::cache_write``."""
        slots = self.recorder.slots_of(self.kinds.get(layer_idx, FULL))
        keys, values = torch.ops.adept_fx.cache_write(
            key_states, value_states, slots, layer_idx, []
        )
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The symbol of the past length."""
        if self.recorder.past is None:
            raise RuntimeError("the capture has no probe for the past length")
        return self.recorder.past.shape[0]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The symbol of the past length."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """The symbol of the key length of this kind of layer."""
        return self.recorder.slots_of(self.kinds.get(layer_idx, FULL)).shape[1], 0


def cache_kinds(config: Any, cache: DynamicCache) -> dict[int, str]:
    """The kind of each cache layer: layers of one kind have one key length."""
    types = getattr(config.get_text_config(decoder=True), "layer_types", None) or []
    kinds = {}
    for index, layer in enumerate(cache.layers):
        sliding = getattr(layer, "is_sliding", False)
        declared = types[index] if len(types) == len(cache.layers) else None
        kinds[index] = declared or ("sliding_attention" if sliding else FULL)
    return kinds


@contextmanager
def intercepted(decoder: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Routes this thread's attention, mask and embedding calls through markers."""
    thread = threading.get_ident()
    with _LOCK, ExitStack() as stack:
        _patch_attention(stack, recorder, thread)
        _patch_masks(stack, decoder, recorder, thread)
        _patch_embedding(stack, decoder, recorder, thread)
        yield


def _replace(stack: ExitStack, holder: Any, name: str, value: object) -> None:
    had, old = name in vars(holder), vars(holder).get(name)
    setattr(holder, name, value)
    stack.callback(lambda: setattr(holder, name, old) if had else delattr(holder, name))


def _patch_attention(stack: ExitStack, recorder: Recorder, thread: int) -> None:
    choose: Callable[..., Any] = AttentionInterface.get_interface
    lookup: Callable[..., Any] = AttentionInterface.__getitem__

    def get_interface(self: Any, implementation: str, default: Callable[..., Any]) -> Any:
        chosen = choose(self, implementation, default)
        return _attention_marker(chosen, recorder) if threading.get_ident() == thread else chosen

    def getitem(self: Any, key: str) -> Any:
        chosen = lookup(self, key)
        return _attention_marker(chosen, recorder) if threading.get_ident() == thread else chosen

    _replace(stack, AttentionInterface, "get_interface", get_interface)
    _replace(stack, AttentionInterface, "__getitem__", getitem)


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


def _mask_functions() -> dict[Callable[..., Any], str]:
    """The mask functions of transformers, with the key of each in a dict of masks."""
    found: dict[Callable[..., Any], str] = {}
    for key, function in masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING.items():
        if callable(function) and hasattr(function, "__name__"):
            found.setdefault(function, key)
    return found


def _patch_masks(stack: ExitStack, decoder: nn.Module, recorder: Recorder, thread: int) -> None:
    functions = _mask_functions()
    both_ways = {
        masking_utils.create_bidirectional_mask,
        masking_utils.create_bidirectional_sliding_window_mask,
    }
    modules = {sys.modules[type(module).__module__] for module in decoder.modules()}
    for module in modules:
        for name, value in list(vars(module).items()):
            if inspect.isfunction(value) and value in functions:
                marker = _mask_marker(value, functions[value], recorder, thread)
                _replace(stack, module, name, marker)
            elif inspect.isfunction(value) and value in both_ways:
                _replace(stack, module, name, _refusal(value, type(decoder).__name__, thread))


def _refusal(function: Callable[..., Any], name: str, thread: int) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return function(*args, **kwargs)
        raise UnsupportedModelError(
            f"{name} attends in both directions: it is an encoder",
            hint="only causal decoders are supported",
        )

    return refuse


def _mask_marker(
    function: Callable[..., Any], key: str, recorder: Recorder, thread: int
) -> Callable[..., Any]:
    signature = inspect.signature(function)
    from_call = ("inputs_embeds", "attention_mask", "past_key_values", "position_ids")

    def marker(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return function(*args, **kwargs)
        bound = dict(signature.bind(*args, **kwargs).arguments)
        inputs = frozenset(name for name in from_call if bound.get(name) is not None)
        static = {name: item for name, item in bound.items() if name not in from_call}
        _refuse_tensors(function, static)
        recorder.masks.append(MaskCall(function, key, static, inputs))
        embeds: Tensor = bound["inputs_embeds"]
        eager = bound["config"]._attn_implementation == "eager"
        return torch.ops.adept_fx.mask(
            embeds,
            recorder.slots_of(key),
            len(recorder.masks) - 1,
            embeds.dtype if eager else torch.bool,
        )

    return marker


def _refuse_tensors(function: Callable[..., Any], static: dict[str, Any]) -> None:
    for name, item in static.items():
        captured = [cell.cell_contents for cell in getattr(item, "__closure__", None) or ()]
        if any(isinstance(part, Tensor) for part in (item, *captured)):
            raise UnsupportedModelError(
                f"the decoder passes a tensor of its own to {function.__name__}({name}=...), "
                "which cannot be rebuilt at run time",
                hint="use a decoder whose masks depend on attention_mask and position_ids only",
            )


def _patch_embedding(stack: ExitStack, decoder: nn.Module, recorder: Recorder, thread: int) -> None:
    embedding = decoder.get_input_embeddings()  # type: ignore[operator]
    forward = embedding.forward

    def marked(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if threading.get_ident() != thread:
            return output
        recorder.embeds += 1
        return torch.ops.adept_fx.embed(output)

    _replace(stack, embedding, "forward", marked)
