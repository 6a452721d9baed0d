"""Notices when the model under a graph has changed.

The graph reads parameters from their modules at every call; whatever else it depends on is
compared, by identity, before each call: modules, tensors' dtype and device, training mode, hooks,
and the settings that change what a module computes.
"""

from copy import copy
from itertools import repeat
from operator import attrgetter
from typing import Any

from torch import nn

from adept_fx.errors import UnsupportedModelError

# Attributes by which modules of transformers and PEFT choose what they compute.
_SETTINGS = (
    *("_disable_adapters", "_active_adapter", "merged_adapters", "cast_input_dtype_enabled"),
    "gradient_checkpointing",
)
# PEFT's layers list further ones, such as the scale of an adapter, in this attribute.
_LISTED = "other_param_names"
PLAIN = (bool, int, float, str, type(None))
_CHOICES = ("_attn_implementation", "_experts_implementation")
_CONFIG_SETTINGS = (*_CHOICES, "is_causal")
_KIND = attrgetter("dtype", "device")
_RECORDERS = ("transformers.utils.output_capturing", "transformers.utils.generic")


class Fingerprint:
    """What a capture saw of its model.

    It is compared before every call: lists and dicts are compared as wholes, at the speed of C.
    """

    def __init__(self) -> None:
        self._tables: list[dict[str, Any]] = []  # of modules: parameters, buffers, children
        self._contents: list[dict[str, Any]] = []
        # Tensors of one element have a truth value when compared; they are told by identity.
        self._single: list[tuple[dict[str, Any], str, Any]] = []
        self._hooks: list[dict[Any, Any]] = []
        self._hook_counts: list[int] = []
        self._attributes: list[dict[str, Any]] = []
        self._forwards: list[Any] = []
        self._tensors: list[Any] = []
        self._kinds: list[Any] = []
        self._holders: list[Any] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._missing: list[tuple[Any, str]] = []

    @staticmethod
    def of(decoder: nn.Module, skip: nn.Module | None = None) -> "Fingerprint":
        """Takes the fingerprint of a decoder, without the subtree ``skip``."""
        self = Fingerprint()
        configs: dict[int, Any] = {}
        skipped = set(skip.modules()) if skip is not None else set()
        for module in decoder.modules():
            if module in skipped:
                continue
            self._add(module, is_root=module is decoder)
            config = getattr(module, "config", None)
            if config is not None:
                configs[id(config)] = config
        for config in configs.values():
            for name in _CONFIG_SETTINGS:
                self._set(config, name, getattr(config, name, None))
        return self

    def _set(self, holder: Any, name: str, value: Any) -> None:
        if not hasattr(holder, name):
            self._missing.append((holder, name))
            return
        self._holders.append(holder)
        self._names.append(name)
        self._values.append(value)

    def _add(self, module: nn.Module, *, is_root: bool) -> None:
        tables = (module._parameters, module._buffers, module._modules)
        self._tables += tables
        self._contents += [dict(table) for table in tables]
        for table in tables[:2]:
            for name, item in table.items():
                if item is None:
                    continue
                self._tensors.append(item)
                self._kinds.append(_KIND(item))
                if item.numel() == 1:
                    self._single.append((table, name, item))
        self._set(module, "training", module.training)
        self._set(module, "__class__", type(module))
        for name in (*_SETTINGS, *getattr(module, _LISTED, ())):
            if hasattr(module, name):
                value = getattr(module, name)
                if isinstance(value, PLAIN):
                    self._set(module, name, value)
                elif isinstance(value, (list, dict)) and _is_plain(value):
                    self._set(module, name, copy(value))
        if not is_root:
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                self._hooks.append(hooks)
                self._hook_counts.append(len(hooks))
            # A forward of the instance's own, as accelerate's hooks and patches put there.
            self._attributes.append(vars(module))
            self._forwards.append(vars(module).get("forward"))

    def matches(self) -> bool:
        """Whether the model is still as it was."""
        try:
            now = list(map(getattr, self._holders, self._names))
        except AttributeError:
            return False
        appeared = any(name in vars(holder) for holder, name in self._missing)
        return now == self._values and not appeared and self.alive()

    def alive(self) -> bool:
        """Whether modules and tensors are still those that were seen, in whatever setting."""
        try:
            # Identical objects are equal; tensors that are not have no common truth value.
            if self._tables != self._contents:
                return False
        except Exception:  # also from the comparison of quantized tensors
            return False
        return (
            all(table[name] is item for table, name, item in self._single)
            and list(map(len, self._hooks)) == self._hook_counts
            and list(map(dict.get, self._attributes, repeat("forward"))) == self._forwards
            and list(map(_KIND, self._tensors)) == self._kinds
        )


def _is_plain(value: list[Any] | dict[Any, Any]) -> bool:
    """Whether a container holds nothing but numbers, texts and the like: it can be compared."""
    items = value.values() if isinstance(value, dict) else value
    return all(isinstance(item, PLAIN) for item in items)


def choices(decoder: nn.Module) -> dict[str, Any]:
    """How the decoder's config chooses attention and expert implementations."""
    config = getattr(decoder, "config", None)
    return {name: getattr(config, name, None) for name in _CHOICES}


def agree(decoder: nn.Module, before: dict[str, Any]) -> dict[str, Any]:
    """Lets a change of implementation in one config reach all.

    A transformed model has configs of its own, but its layers are the original's and look into
    the original's: whichever was changed since ``before`` wins.

    Returns:
        The choices now.
    """
    found = [getattr(module, "config", None) for module in decoder.modules()]
    configs = {id(config): config for config in found if config is not None}
    now = dict(before)
    for name in _CHOICES:
        changed = [v for c in configs.values() if (v := getattr(c, name, None)) != before[name]]
        changed = [value for value in changed if value is not None]
        if changed:
            now[name] = changed[-1]
            for config in configs.values():
                if getattr(config, name, None) is not None:
                    setattr(config, name, now[name])
    return now


def refuse_hooks(decoder: nn.Module) -> None:
    """Raises if a module inside the decoder has forward hooks: a graph would not run them.

    Raises:
        UnsupportedModelError: Names the module and the hook. Hooks of transformers' own output
            recorders are no obstacle: they are inactive unless outputs are recorded.
    """
    refuse_offloading(decoder)
    for name, module in decoder.named_modules():
        if module is decoder:
            continue
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if getattr(hook, "__module__", "") not in _RECORDERS:
                label = getattr(hook, "__qualname__", type(hook).__name__)
                raise UnsupportedModelError(
                    f"module {name} has the forward hook {label}, which a graph does not run",
                    hint="remove the hook, or hook the whole decoder or model instead",
                )


def refuse_offloading(model: nn.Module) -> None:
    """Raises if accelerate moves the model's tensors, or its inputs, from call to call.

    Raises:
        UnsupportedModelError: Names the first module that has one of accelerate's hooks.
    """
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise UnsupportedModelError(
                f"module {name or 'model'} has an accelerate hook (offloading or several devices)",
                hint="load the model on one device, without device_map",
            )


def refuse_several_devices(decoder: nn.Module) -> None:
    """Raises if the decoder's parameters are not all on one device.

    Raises:
        UnsupportedModelError: Names two parameters and where they are.
    """
    places = {parameter.device: name for name, parameter in decoder.named_parameters()}
    if len(places) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise UnsupportedModelError(
            f"{type(decoder).__name__} is spread over several devices ({found})",
            hint="move the whole model to one device: model.to(device)",
        )
