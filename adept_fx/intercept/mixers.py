"""Modules that keep recurrent state as markers.

Which modules these are is found by what they do: of the modules that were handed the cache, the
innermost one that asked it for a state. Nothing goes by a module's name or class hierarchy.
"""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from adept_fx.errors import UnsupportedModelError
from adept_fx.intercept.cache import CaptureCache, RecurrentAccessError, recurrent_layers
from adept_fx.intercept.recorder import Recorder, replace
from adept_fx.ops.mixer import CacheArgument, MixerCall


class MixerFoundError(Exception):
    """A module keeps recurrent state: the trace must start over, with it as a marker."""


def patch_mixers(stack: ExitStack, decoder: nn.Module, recorder: Recorder, thread: int) -> None:
    """Watches the modules of a decoder whose cache holds recurrent state."""
    if not recurrent_layers(CaptureCache(decoder.config, recorder)):
        return
    for name, module in decoder.named_modules():
        if name:
            forward = _watched(module, name, recorder, thread)
            replace(stack, module, "forward", forward)


def _watched(module: nn.Module, name: str, recorder: Recorder, thread: int) -> Callable[..., Any]:
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return original(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if not any(isinstance(leaf, CaptureCache) for leaf in leaves):
            return original(*args, **kwargs)
        if type(module) in recorder.recurrent:
            known = _probe(name, original, leaves, spec)
            return _mark(module, name, leaves, spec, known, recorder)
        try:
            return original(*args, **kwargs)
        except RecurrentAccessError:
            recorder.recurrent.add(type(module))
            raise MixerFoundError from None

    return forward


def _mark(
    module: nn.Module, name: str, leaves: list[Any], spec: Any, known: Any, recorder: Recorder
) -> Any:
    """Calls the marker op in the module's place."""
    position, outputs, output_spec, width, donor = known
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    kept = [CacheArgument() if isinstance(leaf, CaptureCache) else leaf for leaf in leaves]
    for i in at:
        kept[i] = None
    recorder.mixers.append(MixerCall(module, name, tuple(kept), tuple(at), spec, position))
    tensors = [leaves[i] for i in at]
    call = len(recorder.mixers) - 1
    result = torch.ops.adept_fx.mixer(tensors, width, donor, -1, call, [])
    flat = list(outputs)
    flat[position] = result
    return pytree.tree_unflatten(flat, output_spec)


def _probe(
    name: str, forward: Callable[..., Any], leaves: list[Any], spec: Any
) -> tuple[int, list[Any], Any, int, int]:
    """Runs the module without a cache on tensors of the same shapes, to see what it returns."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    shapes = [([_hint(size) for size in t.shape], t.dtype, t.device) for t in tensors]
    with (
        torch.utils._python_dispatch._disable_current_modes(),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        made = iter([torch.empty(s, dtype=dtype, device=device) for s, dtype, device in shapes])
        concrete = [
            next(made)
            if isinstance(leaf, Tensor)
            else None
            if isinstance(leaf, CaptureCache)
            else leaf
            for leaf in leaves
        ]
        args, kwargs = pytree.tree_unflatten(concrete, spec)
        flat, output_spec = pytree.tree_flatten(forward(*args, **kwargs))
    found = [i for i, item in enumerate(flat) if isinstance(item, Tensor)]
    donors = [i for i, (shape, _, _) in enumerate(shapes) if len(shape) == 3]
    if len(found) != 1 or not donors or flat[found[0]].ndim != 3:
        raise UnsupportedModelError(
            f"{name}, which keeps recurrent state, returns something else than one tensor of shape "
            "[batch, tokens, width]",
            hint="such layers are not supported yet",
        )
    at = found[0]
    donor = next((i for i in donors if shapes[i][1] == flat[at].dtype), donors[0])
    width = int(flat[at].shape[2])
    return at, [None if i == at else item for i, item in enumerate(flat)], output_spec, width, donor


def _hint(size: int | SymInt) -> int:
    return int(size.node.hint) if isinstance(size, SymInt) else size
