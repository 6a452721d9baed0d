"""Shells: modules that share everything with another but their identity.

``copy.copy`` of a module shares ``_modules`` itself, and brings along what is bound to the
original (a compiled call, an instance's own ``forward``), which then silently runs the original.
"""

import copy
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

_BOUND = (
    "_compiled_call_impl",
    "_compiled_call",
    "forward",
    "adept",
    "init_continuous_batching",
    "save_pretrained",
)
_TABLES = ("_parameters", "_buffers", "_modules")


def shell(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A new module of the same class with the same children, parameters and buffers.

    Its own tables are new: replacing a child of the shell does not touch ``module``. Nothing that
    is bound to ``module`` comes along, and no hooks.

    Args:
        module: What to share.
        memo: Of ``copy.deepcopy``: configs are copied with it, so that modules that share one go
            on sharing. None keeps ``module``'s own configs.
    """
    new = object.__new__(type(module))
    state: dict[str, Any] = {
        name: _rebound(value, module, new)
        for name, value in vars(module).items()
        if name not in _BOUND
    }
    fresh = vars(nn.Module())
    for name, value in fresh.items():
        if name.endswith("_hooks") or "_hooks_" in name:
            state[name] = copy.copy(value)
    for name in _TABLES:
        state[name] = type(state[name])(state[name])
    state["_modules"].pop("adept", None)
    for name in ("config", "generation_config"):
        if memo is not None and state.get(name) is not None:
            state[name] = copy.deepcopy(state[name], memo)
    new.__dict__.update(state)
    return new


def _rebound(value: Any, old: nn.Module, new: nn.Module) -> Any:
    """A method or partial function of ``old`` (such as a ``generate`` of its own) for ``new``."""
    if isinstance(value, MethodType) and value.__self__ is old:
        return MethodType(value.__func__, new)
    if isinstance(value, partial):
        arguments = [new if item is old else item for item in value.args]
        keywords = {name: new if item is old else item for name, item in value.keywords.items()}
        return partial(value.func, *arguments, **keywords)
    return value


def plain_shell(module: nn.Module) -> nn.Module:
    """A shell that runs the class's own forward on exactly the module's present children.

    Shares the module's tables of parameters and buffers, so that references into them stay true.
    """
    new = shell(module)
    new.__dict__["_parameters"] = module._parameters
    new.__dict__["_buffers"] = module._buffers
    return new


def path_to(model: nn.Module, target: nn.Module) -> list[str] | None:
    """Attribute names that lead from ``model`` to ``target``; None if it is not inside."""
    for name, module in model.named_modules():
        if module is target:
            return name.split(".") if name else []
    return None


def rebuild(
    model: nn.Module, path: list[str], inner: nn.Module, memo: dict[int, Any] | None = None
) -> nn.Module:
    """Shells for every module on ``path`` from ``model``, ending in ``inner``."""
    if not path:
        return inner
    new = shell(model, memo)
    new._modules[path[0]] = rebuild(model.get_submodule(path[0]), path[1:], inner, memo)
    return new
