"""Notices when the model under a graph has changed.

The graph reads parameters from their modules at every call; whatever else it depends on is
compared, by identity, before each call: modules, tensors' dtype and device, training mode, hooks,
and the settings that change what a module computes.
"""

from copy import copy
from dataclasses import dataclass, field
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
_PLAIN = (bool, int, float, str, type(None))
_CHOICES = ("_attn_implementation", "_experts_implementation")
_CONFIG_SETTINGS = (*_CHOICES, "is_causal")
_RECORDERS = ("transformers.utils.output_capturing", "transformers.utils.generic")


@dataclass
class Fingerprint:
    """What a capture saw of its model.

    ``entries`` are ``(table, key, object)``: the object must still be there. ``tensors`` are
    ``(tensor, dtype, device)``. ``settings`` are ``(holder, name, value)``.
    """

    entries: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)
    sizes: list[tuple[dict[Any, Any], int]] = field(default_factory=list)
    tensors: list[tuple[Any, Any, Any]] = field(default_factory=list)
    settings: list[tuple[Any, str, Any]] = field(default_factory=list)

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
                self.settings.append((config, name, getattr(config, name, None)))
        return self

    def _add(self, module: nn.Module, *, is_root: bool) -> None:
        tables = (module._parameters, module._buffers, module._modules)
        for table in tables:
            self.sizes.append((table, len(table)))
            self.entries += [(table, key, item) for key, item in table.items()]
        self.tensors += [
            (item, item.dtype, item.device)
            for table in tables[:2]
            for item in table.values()
            if item is not None
        ]
        self.settings.append((module, "training", module.training))
        self.settings.append((module, "__class__", type(module)))
        for name in (*_SETTINGS, *getattr(module, _LISTED, ())):
            if hasattr(module, name):
                value = getattr(module, name)
                if isinstance(value, _PLAIN):
                    self.settings.append((module, name, value))
                elif isinstance(value, (list, dict)) and _is_plain(value):
                    self.settings.append((module, name, copy(value)))
        if not is_root:
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                self.sizes.append((hooks, len(hooks)))
            # A forward of the instance's own, as accelerate's hooks and patches put there.
            self.entries.append((vars(module), "forward", vars(module).get("forward")))

    def matches(self) -> bool:
        """Whether the model is still as it was."""
        return self.alive() and all(
            getattr(holder, name, None) == value for holder, name, value in self.settings
        )

    def alive(self) -> bool:
        """Whether modules and tensors are still those that were seen, in whatever setting."""
        # Plain loops: this runs before every call, and generators would take twice as long.
        for table, key, item in self.entries:
            if table.get(key) is not item:
                return False
        for table, size in self.sizes:
            if len(table) != size:
                return False
        for tensor, dtype, device in self.tensors:
            if tensor.dtype is not dtype or tensor.device != device:
                return False
        return True


def _is_plain(value: list[Any] | dict[Any, Any]) -> bool:
    """Whether a container holds nothing but numbers, texts and the like: it can be compared."""
    items = value.values() if isinstance(value, dict) else value
    return all(isinstance(item, _PLAIN) for item in items)


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
