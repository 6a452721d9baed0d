"""The model's head, for gates that look at logits."""

import copy
import inspect
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from adept_fx.errors import UnsupportedModelError
from adept_fx.shell import path_to, rebuild


class _Stub(nn.Module):
    """A decoder that returns its ``inputs_embeds`` as the last hidden state."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
        """Returns what it was given."""
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


class Head:
    """What the model does after its decoder, by the model's own forward.

    ``get_output_embeddings()`` is not the head: scales and soft caps live in the forward. So the
    model's own forward runs, around a decoder that does nothing.

    Args:
        model: The whole model.
        decoder: Its decoder.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module) -> None:
        self.model = model
        self.decoder = decoder

    def check(self) -> None:
        """Raises if the model has no logits.

        Raises:
            UnsupportedModelError: It is a bare decoder.
        """
        if self.model is self.decoder:
            raise UnsupportedModelError(
                f"the gate asks for logits, but {type(self.model).__name__} has no head",
                hint="transform the model with its head, or use a gate on the hidden state",
            )

    def __call__(self, norm: nn.Module, hidden: Tensor) -> Tensor:
        """Logits ``[N, V]`` that tokens with states ``hidden [N, D]`` would emit."""
        self.check()
        # Every token is a row of its own: heads that pool a row see that token alone.
        final = norm(hidden.unsqueeze(1))
        path = path_to(self.model, self.decoder)
        stub = _Stub(self.decoder.config)
        # Built anew each time: it shares whatever the model's own modules are now.
        whole: Any = rebuild(self.model, path or [], stub)
        if getattr(whole.config, "pad_token_id", 0) is None:
            # Pooling heads ask for it when there is more than one row; with one token it is unused.
            whole.__dict__["config"] = copy.copy(whole.config)
            whole.config.pad_token_id = 0
        keywords = {"use_cache": False, "return_dict": True}
        known = inspect.signature(type(whole).forward).parameters
        chosen = {name: value for name, value in keywords.items() if name in known}
        logits: Tensor = whole(inputs_embeds=final, **chosen).logits
        return logits[:, -1] if logits.ndim == 3 else logits
