"""Makes what a decoder does with caches, masks and attention visible to a trace.

While a decoder is captured, and only for the capturing thread:

- ``AttentionInterface`` hands out a marker in place of the attention function that the model
  chose; the chosen function is recorded and called at run time;
- the mask functions (``create_causal_mask`` and relatives) that the model's module imported are
  replaced by a marker; the real one is called at run time with the call's own cache and mask;
- modules that keep recurrent state in the cache become markers as a whole;
- the input embedding's output is marked, so that the graph can start from ``inputs_embeds``.

Everything is put back when the context closes.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from adept_fx.intercept.attention import patch_attention
from adept_fx.intercept.cache import CaptureCache, cache_kinds
from adept_fx.intercept.embedding import patch_embedding
from adept_fx.intercept.masks import patch_masks
from adept_fx.intercept.mixers import patch_mixers
from adept_fx.intercept.recorder import FULL, MaskCall, Recorder

__all__ = ["FULL", "CaptureCache", "MaskCall", "Recorder", "cache_kinds", "intercepted"]

_LOCK = threading.RLock()


@contextmanager
def intercepted(decoder: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Routes this thread's attention, mask, mixer and embedding calls through markers."""
    thread = threading.get_ident()
    with _LOCK, ExitStack() as stack:
        patch_attention(stack, recorder, thread)
        patch_masks(stack, decoder, recorder, thread)
        patch_mixers(stack, decoder, recorder, thread)
        patch_embedding(stack, decoder, recorder, thread)
        yield
