"""Which stages are equal, so that one compiled function serves them all."""

from typing import Any

from torch import Tensor, fx, nn
from torch.fx import Node
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adept_fx.gates.base import Gate
from adept_fx.graph.blocks import AttentionRegion, MixerRegion
from adept_fx.ops.attention import Attention, AttentionCall
from adept_fx.runtime.fingerprint import PLAIN


def signature(graph: fx.GraphModule) -> Any:
    """Equal for lowered stages that compute the same from equal inputs; None if unknown.

    Names of nodes and the tensors themselves do not count.
    """
    try:
        return _of_graph(graph)
    except _Unknown:
        return None


class _Unknown(Exception):
    """A part of a graph that may depend on more than its inputs."""


def _of_graph(graph: fx.GraphModule) -> Any:
    numbers = {node: at for at, node in enumerate(graph.graph.nodes)}

    def plain(item: Any) -> Any:
        if isinstance(item, Node):
            return ("node", numbers[item])
        if isinstance(item, (list, tuple)):
            return tuple(plain(part) for part in item)
        if isinstance(item, dict):
            return tuple((key, plain(part)) for key, part in item.items())
        return (type(item).__name__, repr(item))

    return tuple(
        (node.op, _target(graph, node), plain(node.args), plain(node.kwargs), _like(node))
        for node in graph.graph.nodes
    )


def _like(node: Node) -> Any:
    """Sizes and dtypes of a tensor of the model: those of other inputs are the call's."""
    value = node.meta.get("val")
    if node.op != "placeholder" or not isinstance(value, Tensor):
        return None
    return value.dtype, tuple(size if isinstance(size, int) else None for size in value.shape)


def _target(graph: fx.GraphModule, node: Node) -> Any:
    if node.op == "placeholder":
        return None
    if node.op != "call_module":
        return node.target
    return _of_module(graph.get_submodule(str(node.target)))


def _of_module(module: nn.Module) -> Any:
    if isinstance(module, AttentionRegion):
        facts = (tuple(module.kinds), tuple(module.axes), tuple(module.output))
        return facts, _of_graph(module.graph)
    if isinstance(module, Attention):
        return _of_call(module.call[0])
    if isinstance(module, MixerRegion):
        raise _Unknown("a mixer reads its own parameters")
    raise _Unknown(type(module).__name__)


def _of_call(call: AttentionCall) -> Any:
    # A registered function serves every model: it can read nothing of a module but settings. A
    # model's own may read its parameters, which equal stages do not share.
    if call.function not in ALL_ATTENTION_FUNCTIONS.values():
        raise _Unknown("an attention function of the model's own")
    return call.function, _settings(call.module), _keywords(call.keywords), call.extras


def _settings(module: nn.Module) -> Any:
    found = {k: v for k, v in vars(module).items() if k != "layer_idx" and isinstance(v, PLAIN)}
    return type(module), tuple(sorted(found.items(), key=lambda item: item[0]))


def _keywords(keywords: dict[str, Any]) -> Any:
    return tuple(
        (name, value if isinstance(value, PLAIN) else id(value))
        for name, value in sorted(keywords.items())
    )


def gate_kind(gate: Gate) -> Any:
    """Equal for gates that differ in nothing but their own tensors."""
    if gate._modules:
        return id(gate)
    plain = {k: v for k, v in vars(gate).items() if isinstance(v, PLAIN) and k[0] != "_"}
    return type(gate), tuple(sorted(plain.items())), tuple(sorted(gate.needs))
