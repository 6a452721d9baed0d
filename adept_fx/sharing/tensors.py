"""The exits' own tensors: out of a handle, into a file and back."""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load as parse
from safetensors.torch import save as serialize
from torch import Tensor, nn

from adept_fx.errors import CheckpointError, ConfigError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def first_names(module: nn.Module) -> dict[str, str]:
    """For each name in a state dict, the one under which its module comes first.

    A gate that serves several exits has several names. Its tensors are kept under the first one:
    safetensors takes no tensor twice, and the config says which exits share a gate.
    """
    first: dict[int, str] = {}
    found = {}
    paths = dict(module.named_modules(remove_duplicate=False))
    for path, inner in paths.items():
        first.setdefault(id(inner), path)
    for name in module.state_dict():
        path, dot, last = name.rpartition(".")
        found[name] = first[id(paths[path])] + dot + last if path in paths else name
    return found


def own_tensors(adept: nn.Module, state: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Copies of all that a handle holds, on the CPU, each once.

    Args:
        adept: The handle.
        state: Names and values to keep instead of the handle's own, as far as it has them.

    Raises:
        ConfigError: Something is no plain tensor of finite numbers.
    """
    own = adept.state_dict()
    state = {} if state is None else state
    kept = {}
    for name in sorted(set(first_names(adept).values())):
        kept[name] = _checked(name, state.get(name, own[name]))
    return kept


def _checked(name: str, value: Any) -> Tensor:
    if type(value) not in (Tensor, nn.Parameter) or value.is_meta:
        raise ConfigError(
            f"adept.{name} is no plain tensor ({type(value).__name__}) and cannot be saved",
            hint="save before quantizing or sharding the exits",
        )
    tensor: Tensor = value.detach().to("cpu", copy=True).contiguous()
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ConfigError(f"adept.{name} holds values that are not finite: nothing is saved")
    return tensor


def to_bytes(tensors: dict[str, Tensor]) -> bytes:
    """The file's content."""
    return bytes(serialize(tensors, metadata={"format": "pt"}))


def from_bytes(data: bytes) -> dict[str, Tensor]:
    """Reads the file's content.

    Raises:
        CheckpointError: It is no safetensors file, or it holds numbers that are not finite.
    """
    try:
        tensors: dict[str, Tensor] = parse(data)
    # Whatever a parser raises on what is not its format: no list of it is complete.
    except Exception as error:
        raise CheckpointError(f"the exits' tensors cannot be read: {error}") from error
    for name, tensor in tensors.items():
        check_finite(name, tensor)
    return tensors


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuses NaN and infinity in plain floating-point tensors.

    Raises:
        CheckpointError: There is one.
    """
    if tensor.dtype in FLOATS and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"tensor {name!r} holds values that are not finite")


def check_names(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Checks names, shapes and kinds of number.

    Raises:
        CheckpointError: A tensor is missing, unknown, or of another shape or kind.
    """
    missing, unknown = (
        sorted(wanted.keys() - tensors.keys()),
        sorted(tensors.keys() - wanted.keys()),
    )
    if missing or unknown:
        raise CheckpointError(
            f"the exits' tensors do not fit their config: missing {missing[:4]}, "
            f"unknown {[name[:80] for name in unknown[:4]]}"
        )
    for name, own in sorted(wanted.items(), key=lambda item: item[0]):
        tensor = tensors[name]
        if tensor.shape != own.shape:
            raise CheckpointError(
                f"tensor {name!r} is {list(tensor.shape)}, not {list(own.shape)} as its config says"
            )
        fits = tensor.dtype in FLOATS if own.is_floating_point() else tensor.dtype == own.dtype
        if not fits:
            raise CheckpointError(f"tensor {name!r} is {tensor.dtype}, which is no {own.dtype}")


def cast_gates(gates: nn.Module, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Brings new gates to a device, and to the dtypes that their tensors were saved in.

    A gate trained in fp32 keeps that over a bf16 base.
    """
    first = first_names(gates)
    for name, own in gates.state_dict(keep_vars=True).items():
        saved = tensors[f"gates.{first[name]}"]
        own.data = own.data.to(device, saved.dtype if own.is_floating_point() else own.dtype)


def fill(adept: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives a handle its tensors, in the dtypes that it has.

    Raises:
        CheckpointError: A tensor does not fit, or is too large for the dtype.
    """
    names, own = first_names(adept), adept.state_dict()
    check_names({name: own[name] for name in set(names.values())}, tensors)
    state = {name: tensors[first].to(own[name].dtype) for name, first in names.items()}
    for name, tensor in state.items():
        check_finite(name, tensor)
    adept.load_state_dict(state, strict=True)
