"""Which tokens a classification head makes its logits of.

Once they have all left, the rest of their row cannot change the result any more. The head says it
itself: its own forward runs on the arguments of the call, around a decoder whose hidden states
hold no numbers, only where they come from (see :mod:`adept_fx.runtime.marks`).
"""

import copy
import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers.modeling_outputs import BaseModelOutputWithPast

from adept_fx.runtime.marks import MANY, Marked
from adept_fx.shell import path_to, rebuild

# Chosen by the caller for what follows the logits: a loss, the form of the output.
_AFTERWARDS = ("labels", "return_dict")


class _Source(nn.Module):
    """A decoder whose hidden states are given, once."""

    def __init__(self, config: Any, hidden: Tensor) -> None:
        super().__init__()
        self.config = config
        self.hidden = [hidden]  # in a list: only where it is taken from counts

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        """Returns the given states; a second call has none."""
        return BaseModelOutputWithPast(last_hidden_state=self.hidden.pop())


class Pooling:
    """Takes the place of a model's ``forward``, where its head pools a row's tokens.

    The decoder asks here, during such a forward alone, which tokens count: who calls the decoder
    itself wants all hidden states.

    Args:
        model: The whole model.
        decoder: Its decoder.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module) -> None:
        self.model = model
        self.decoder = decoder
        self.path = path_to(model, decoder) or []
        forward = inspect.signature(type(model).forward)
        # What tools that look at a forward's parameters are to see.
        self.__signature__ = forward.replace(parameters=list(forward.parameters.values())[1:])
        self._calls = threading.local()

    def works(self) -> bool:
        """Whether the head gives one result per row, and can be followed."""
        weight: Tensor = self.decoder.get_input_embeddings().weight  # type: ignore[operator]
        ids = torch.zeros(1, 2, dtype=torch.long, device=weight.device)
        embeds = weight.new_empty(1, 2, weight.shape[-1])
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        given = {k: v for k, v in example.items() if k in self.__signature__.parameters}
        return self._trace(given, embeds) is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model's own forward."""
        outer = getattr(self._calls, "arguments", None)
        self._calls.arguments = (args, kwargs)
        try:
            return type(self.model).forward(self.model, *args, **kwargs)
        finally:
            self._calls.arguments = outer

    def pooled_tokens(self, embeds: Tensor) -> Tensor | None:
        """Tokens that the present call's result depends on, ``[B, S]`` bool.

        Args:
            embeds: What the decoder was given, ``[B, S, D]``.

        Returns:
            None outside of a call of the model, and if the head cannot be followed.
        """
        given = getattr(self._calls, "arguments", None)
        if given is None:
            return None
        bound = self.__signature__.bind(*given[0], **given[1])
        arguments = dict(bound.arguments)
        for name, parameter in self.__signature__.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
        pooled: Tensor | None = self._trace(arguments, embeds)
        return pooled

    def tokens_of(self, arguments: dict[str, Any]) -> Tensor | None:
        """The same for a call with these arguments, ``input_ids [B, S]`` among them."""
        ids: Tensor = arguments["input_ids"]
        weight: Tensor = self.decoder.get_input_embeddings().weight  # type: ignore[operator]
        embeds = weight.new_empty(*ids.shape, weight.shape[-1])
        found: Tensor | None = self._trace(arguments, embeds)
        return found

    @torch.compiler.disable
    def _trace(self, arguments: dict[str, Any], embeds: Tensor) -> Tensor | None:
        arguments = {k: v for k, v in arguments.items() if k not in _AFTERWARDS}
        parameters = self.__signature__.parameters.values()
        if any(p.name == "return_dict" or p.kind is p.VAR_KEYWORD for p in parameters):
            arguments["return_dict"] = True
        # Inference mode hands composite operations on whole; who counts or logs operations
        # is not to see these.
        with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
            hidden = Marked.hidden(embeds)
            whole = rebuild(self.model, self.path, _Source(self.decoder.config, hidden))
            if any(m._forward_hooks or m._forward_pre_hooks for m in whole.modules()):
                return None  # hooks are not to see a call that nobody made
            try:
                return _pooled(whole(**arguments), embeds.shape[0], embeds.shape[1])
            except Exception:  # a head may do, and so raise, anything
                return None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pooling":
        """A copy has its own calls."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.model = copy.deepcopy(self.model, memo)
        copied.decoder = copy.deepcopy(self.decoder, memo)
        copied.path = list(self.path)
        copied.__signature__ = self.__signature__
        copied._calls = threading.local()
        return copied


def _pooled(output: Any, batch: int, tokens: int) -> Tensor | None:
    """Tokens behind a head's output; None unless it has one row of logits per row."""
    if not isinstance(output.logits, Marked) or output.logits.ndim != 2:
        return None
    rows = torch.arange(batch, device=output.logits.device)
    columns = torch.arange(tokens, device=output.logits.device)
    pooled = torch.zeros(batch, tokens, dtype=torch.bool, device=output.logits.device)
    for value in output.values():
        if not isinstance(value, Marked):
            continue
        row, column = value.by_entry()
        if not torch.equal(row, rows):
            return None
        pooled |= (column[:, None] == columns) | (column[:, None] == MANY)
    return pooled
