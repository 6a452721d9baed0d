"""The model's head, for gates that look at logits."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adept_fx.errors import UnsupportedModelError
from adept_fx.gates.base import DRAFT_SIZE
from adept_fx.runtime.drafts import CHOSEN, Rows, disagree, output_embedding
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
        self._built_rows: tuple[nn.Module, nn.Module, nn.Module] | None = None

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
        return self._run(self._whole(output_type), norm, hidden)

    def rows(self, norm: nn.Module, hidden: Tensor, output_type: type, chosen: Tensor) -> Tensor:
        """Some of the logits that tokens with states ``hidden [N, D]`` would emit, ``[N, k]``.

        Args:
            norm: What stands between the last layer and the head.
            hidden: The states.
            output_type: Class of the decoder's output, which the head reads.
            chosen: Entries of the vocabulary for each token, ``[N, k]``.

        Raises:
            UnsupportedModelError: The output embedding is no plain linear layer.
        """
        self.check()
        model = self._with_rows(output_type)
        before = CHOSEN.set(chosen)
        try:
            return self._run(model, norm, hidden)
        finally:
            CHOSEN.reset(before)

    def check_rows(self, norm: nn.Module, hidden: Tensor, output_type: type) -> None:
        """Raises if :meth:`rows` does not give what the whole head does.

        Args:
            norm: What stands between the last layer and the head.
            hidden: States to try it with, ``[N, D]``.
            output_type: Class of the decoder's output, which the head reads.

        Raises:
            UnsupportedModelError: The model has no head, or one that needs all logits at once.
        """
        self.check()
        embedding = output_embedding(self.model)
        if hidden.is_meta or embedding.out_features < DRAFT_SIZE:
            return  # nothing to compare; too few classes are refused when they are seen
        cause: Exception | None = None
        with torch.no_grad():
            whole = self(norm, hidden, output_type)
            chosen = whole.topk(DRAFT_SIZE, dim=-1).indices
            try:
                wrong = disagree(self.rows(norm, hidden, output_type, chosen), whole, chosen)
            except UnsupportedModelError:
                raise
            except Exception as error:  # whatever a model's own forward does with fewer logits
                wrong, cause = True, error
        if wrong:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does more with its logits than can be done with a "
                "few of them, which the gate asks for",
                hint='use gate="mlp", or "max_prob" for the whole head',
            ) from cause

    def _run(self, model: nn.Module, norm: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        # Every token is a row of its own: heads that pool a row see that token alone.
        final = norm(hidden.unsqueeze(1))
        logits: Tensor = model(inputs_embeds=final, **self.keywords).logits
        return logits[:, -1] if logits.ndim == 3 else logits

    def _with_rows(self, output_type: type) -> nn.Module:
        """The same with a few rows of its output embedding."""
        whole, embedding = self._whole(output_type), output_embedding(self.model)
        built = self._built_rows
        if built is None or built[0] is not whole or built[1] is not embedding:
            path = path_to(whole, embedding)
            if not path:
                raise UnsupportedModelError(
                    f"the output embedding of {type(self.model).__name__} is not beside its "
                    "decoder, so the gate cannot be given a few rows of it",
                    hint='use gate="mlp", or "max_prob" for the whole head',
                )
            built = (whole, embedding, rebuild(whole, path, Rows(embedding)))
            self._built_rows = built
        return built[2]

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
        copied._built = copied._built_rows = None
        return copied
