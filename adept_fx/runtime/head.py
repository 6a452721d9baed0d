"""The model's head, for gates that look at logits."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from adept_fx.errors import UnsupportedModelError
from adept_fx.shell import path_to, rebuild


class _Stub(nn.Module):
    """A decoder that returns its ``inputs_embeds`` as the last hidden state."""

    def __init__(self, config: Any, output_type: type) -> None:
        super().__init__()
        self.config = config
        self.output_type = output_type

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        """Returns what it was given."""
        return self.output_type(last_hidden_state=inputs_embeds)


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
        self.path = path_to(model, decoder) or []
        known = inspect.signature(type(model).forward).parameters
        keywords = {"use_cache": False, "return_dict": True}
        self.keywords = {name: value for name, value in keywords.items() if name in known}
        self._built: tuple[list[Any], nn.Module] | None = None

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

    def __call__(
        self, norm: Callable[[Tensor], Tensor], hidden: Tensor, output_type: type
    ) -> Tensor:
        """Logits ``[N, V]`` that tokens with states ``hidden [N, D]`` would emit.

        Args:
            norm: What stands between the last layer and the head.
            hidden: The states.
            output_type: Class of the decoder's output, which the head reads.
        """
        self.check()
        # Every token is a row of its own: heads that pool a row see that token alone.
        final = norm(hidden.unsqueeze(1))
        logits: Tensor = self._whole(output_type)(inputs_embeds=final, **self.keywords).logits
        return logits[:, -1] if logits.ndim == 3 else logits

    def _whole(self, output_type: type) -> nn.Module:
        """The model around a decoder that does nothing; built again if the model has changed."""
        seen: list[Any] = [output_type]
        module = self.model
        for name in self.path:
            seen += [*module._modules.values(), getattr(module, "config", None)]
            module = module.get_submodule(name)
        built = self._built
        if (
            built is None
            or len(built[0]) != len(seen)
            or any(a is not b for a, b in zip(built[0], seen, strict=True))
        ):
            whole: Any = rebuild(self.model, self.path, _Stub(self.decoder.config, output_type))
            if getattr(whole.config, "pad_token_id", 0) is None:
                # Pooling heads ask for it where there are several rows; one token needs none.
                whole.__dict__["config"] = copy.copy(whole.config)
                whole.config.pad_token_id = 0
            built = self._built = (seen, whole)
        return built[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Head":
        """A copy builds its own shells."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.model = copy.deepcopy(self.model, memo)
        copied.decoder = copy.deepcopy(self.decoder, memo)
        copied.path, copied.keywords = list(self.path), dict(self.keywords)
        copied._built = None
        return copied
