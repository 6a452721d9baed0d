"""The base that exits were made for: what is kept of it, and whether a model is it.

Of at most 512 parameters the shape and 16 values are kept. A base is the same if those agree. As
loading in another dtype rounds them, values may be compared in a less precise dtype, if it holds
the values of one of the two exactly: a bf16 copy of fp32 weights is the same base, in either
direction, and a finetune in the same dtype is not.

Parameters are found by name, without PEFT's ``base_layer``. Exits that were made over adapters need
them; adapters that a model has beyond that are not looked at. Quantized parameters (tensor
subclasses, and dtypes that are no plain floating-point numbers) are skipped.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adept_fx.model_facts import hidden_size, layer_count
from adept_fx.sharing.names import public_name

_SAMPLES = 16
_PARAMETERS = 512
_GOLDEN = 0.6180339887498949
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sampled:
    """What is kept of a parameter: its shape, and some values as the hex of float32 numbers."""

    shape: tuple[int, ...]
    values: str

    @property
    def tensor(self) -> Tensor:
        """The values."""
        return torch.frombuffer(bytearray.fromhex(self.values), dtype=torch.float32)


@dataclass(frozen=True)
class Base:
    """What is kept of a base.

    Attributes:
        kind: Its class.
        model_type: That of its config.
        layers: How many.
        hidden_size: Width of the residual stream.
        vocab_size: That of its config, if it has one.
        name: Where others find it, if it is known; never a local folder.
        parameters: Some of its parameters, by name.
    """

    kind: str
    model_type: str
    layers: int
    hidden_size: int
    vocab_size: int | None
    name: str | None
    parameters: dict[str, Sampled]

    @classmethod
    def of(cls, model: Any, decoder: Any) -> "Base":
        """Looks at a model, rewritten or not; a handle's parameters are not the base's.

        Raises:
            ConfigError: The config does not say how many layers there are, or how wide they are.
        """
        found = comparable(model)
        names = sorted(found)
        count = min(len(names), _PARAMETERS)
        chosen = [names[at * len(names) // count] for at in range(count)]
        return cls(
            kind=type(model).__name__,
            model_type=str(model.config.model_type),
            layers=layer_count(decoder),
            hidden_size=hidden_size(decoder),
            vocab_size=getattr(decoder.config, "vocab_size", None),
            name=public_name(getattr(model, "name_or_path", None)),
            parameters={name: _sampled(found[name]) for name in chosen},
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        """How messages call it."""
        return self.name or f"a {self.kind} of {self.layers} layers, width {self.hidden_size}"

    def unfit(self, model: Any, decoder: Any) -> str:
        """Says why exits of this base cannot even be attached to a model; empty if they can."""
        for what, ours, theirs in (
            ("layers", self.layers, layer_count(decoder)),
            ("hidden size", self.hidden_size, hidden_size(decoder)),
        ):
            if ours != theirs:
                return f"{type(model).__name__} has {what} {theirs}, not {ours}"
        return ""

    def difference(self, model: Any, decoder: Any) -> str:
        """Says by what a model is another base than this one; empty if it is the same."""
        for what, ours, theirs in (
            ("class", self.kind, type(model).__name__),
            ("model type", self.model_type, str(model.config.model_type)),
            ("vocabulary", self.vocab_size, getattr(decoder.config, "vocab_size", None)),
        ):
            if ours != theirs:
                return f"its {what} is {theirs}, not {ours}"
        return self._parameters_differ(model)

    def _parameters_differ(self, model: Any) -> str:
        found, present = comparable(model), _named(model)
        quantized = getattr(model.config, "quantization_config", None) is not None
        compared = 0
        for name, kept in self.parameters.items():
            if name not in found:
                if name in present or quantized:  # here, but in another form
                    continue
                return f"it has no parameter {name}"
            shape = tuple(found[name].shape)
            if shape != kept.shape:
                return f"{name} is {list(shape)}, not {list(kept.shape)}"
            if not _same(_sampled(found[name]).tensor, kept.tensor):
                return f"{name} has other values"
            compared += 1
        return "" if compared else "none of its parameters can be compared (all are quantized?)"


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if not name.startswith("adept.")
    }


def comparable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's parameters that hold plain floating-point numbers, by name without PEFT's part."""
    return {
        name: parameter
        for name, parameter in _named(model).items()
        if type(parameter) is nn.Parameter
        and parameter.dtype in _PLAIN
        and parameter.numel()
        and not parameter.is_meta
    }


@torch.no_grad()
def _sampled(parameter: Tensor) -> Sampled:
    # Multiples of the golden ratio spread evenly, and not over one column, as even steps may.
    size = parameter.numel()
    places = [int((at + 0.5) * _GOLDEN % 1.0 * size) for at in range(_SAMPLES)]
    where = torch.tensor(places, device=parameter.device)
    # By indices: flattening what is not contiguous would copy all of it.
    values = parameter[torch.unravel_index(where, parameter.shape)] if parameter.ndim else parameter
    numbers = values.reshape(-1).expand(_SAMPLES).to("cpu", torch.float32)
    raw = numbers.contiguous().numpy().astype("<f4").tobytes()
    return Sampled(tuple(parameter.shape), raw.hex())


def _same(one: Tensor, other: Tensor) -> bool:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        low, also = one.to(dtype), other.to(dtype)
        exact = _equal(low.float(), one) or _equal(also.float(), other)
        if exact and _equal(low.float(), also.float()):
            return True
    return False


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)
