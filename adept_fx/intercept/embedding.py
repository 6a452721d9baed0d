"""The input embedding as a marker."""

import threading
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from adept_fx.intercept.recorder import Recorder, replace


def patch_embedding(stack: ExitStack, decoder: nn.Module, recorder: Recorder, thread: int) -> None:
    """Marks the output of the input embedding."""
    embedding = decoder.get_input_embeddings()  # type: ignore[operator]
    forward = embedding.forward

    def marked(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if threading.get_ident() != thread:
            return output
        recorder.embeds += 1
        return torch.ops.adept_fx.embed(output)

    replace(stack, embedding, "forward", marked)
