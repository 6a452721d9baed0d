"""`check_pass`, and graphs of tiny models just before each pass."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import sympy
import torch
from torch import SymInt, Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from adept_fx.capture import Capture, accepts, capture
from adept_fx.errors import PassError
from adept_fx.graph import meta
from adept_fx.graph.base import Pass, PassResult, Stage, Work
from adept_fx.graph.runner import PassRecord, propagate, run_passes
from adept_fx.graph.symbols import expression
from adept_fx.kv import KVPolicy
from adept_fx.pipeline import PIPELINE, start
from models import tiny

aten = torch.ops.aten
TYPES = ("llama", "gpt_neox", "mixtral", "opt", "bloom")
# Rotary models: every layer reads cos and sin, one unsqueeze each.
ROTARY = ("llama", "gpt_neox", "mixtral")
SLOW = ("mixtral", "bloom")  # to capture: one depth is enough
MODELS = [(kind, layers) for kind in TYPES for layers in (3, 5) if layers == 3 or kind not in SLOW]
EXITS: dict[int, tuple[tuple[int, ...], ...]] = {
    3: ((1,), (2,), (1, 2)),
    5: ((1, 3), (4,), (1, 2, 3, 4)),
}
CASES = [(kind, layers, exits) for kind, layers in MODELS for exits in EXITS[layers]]

each_model = pytest.mark.parametrize(("kind", "layers"), MODELS)
each_case = pytest.mark.parametrize(("kind", "layers", "exits"), CASES)


@cache
def captured(kind: str, layers: int) -> Capture:
    decoder = tiny(kind, layers=layers).get_decoder()
    return capture(decoder, positions=accepts(decoder, "position_ids"))


def started(source: Capture, exits: tuple[int, ...], needs: tuple[str, ...] = ()) -> Work:
    """A copy of a capture, ready for the first pass; each gate asks for `needs`."""
    asked = tuple(frozenset(needs) for _ in exits)
    return duplicate(start(source, exits, asked, KVPolicy()))


def duplicate(work: Work) -> Work:
    """A work of its own; only what passes change is copied."""
    return replace(work, graph=deepcopy(work.graph), queries=dict(work.queries))


@cache
def _after(count: int, kind: str, layers: int, exits: tuple[int, ...]) -> Work:
    if not count:
        return started(captured(kind, layers), exits)
    work = duplicate(_after(count - 1, kind, layers, exits))
    run_passes(work, [PIPELINE[count - 1]()])
    return work


def before(step: type[Pass], kind: str, layers: int, exits: tuple[int, ...] = (1,)) -> Work:
    """A graph that has come to just before `step`."""
    return duplicate(_after(PIPELINE.index(step), kind, layers, exits))


def run_all(work: Work, until: type[Pass] | None = None) -> list[PassRecord]:
    """Runs the pipeline, without `until` and what follows it."""
    steps = PIPELINE if until is None else PIPELINE[: PIPELINE.index(until)]
    return run_passes(work, [step() for step in steps])


def check_pass(step: type[Pass], work: Work, *, metadata: bool = True) -> dict[str, int]:
    """Runs `step` twice: `modified` is true to what changed, the second run changes nothing.

    Returns the counts of the first run.
    """
    old = snapshot(work)
    (record,) = run_passes(work, [step()])
    new = snapshot(work)
    assert record.name == step.__module__.rpartition(".")[2]
    assert record.modified == (old != new)
    assert work.stage == step.reaches
    (again,) = run_passes(work, [step()])
    assert snapshot(work) == new, "a second run changes the graph"
    assert not again.modified
    if metadata and work.stage < Stage.COMPACTED:
        check_metadata(work)
    return record.counts


def snapshot(work: Work) -> dict[str, Any]:
    """Everything that a pass may change: code at every depth, and facts about nodes."""
    parts: dict[str, Any] = {"layers": work.num_layers, "queries": dict(work.queries)}
    for path, module in work.graph.named_modules():
        if isinstance(module, fx.GraphModule):
            facts = [(node.name, str(node.target), meta.get(node)) for node in module.graph.nodes]
            parts[path] = (module.graph.python_code("self").src, facts)
    return parts


def check_metadata(work: Work) -> None:
    """Every op's fake value has the shape and dtype that its inputs' values give it."""
    nodes = work.graph.graph.find_nodes
    mode = detect_fake_mode([node.meta["val"] for node in nodes(op="placeholder")])
    assert mode is not None
    for node in work.graph.graph.nodes:
        if node.op != "call_function":
            continue
        known = node.meta["val"]
        if not free_unbacked_symbols([known, *(i.meta["val"] for i in node.all_input_nodes)]):
            assert_same(propagate(node, mode), known, node.format_node())


def assert_same(found: object, known: object, where: str | None) -> None:
    if isinstance(known, (tuple, list)):
        assert isinstance(found, (tuple, list)), where
        assert len(found) == len(known), where
        for left, right in zip(found, known, strict=True):
            assert_same(left, right, where)
    elif isinstance(known, Tensor):
        assert isinstance(found, Tensor), where
        assert (found.dtype, found.device, found.ndim) == (known.dtype, known.device, known.ndim)
        for left, right in zip(found.shape, known.shape, strict=True):
            assert same_size(left, right), f"{where}: {found.shape}, not {known.shape}"
    elif isinstance(known, (int, SymInt)):
        assert isinstance(found, (int, SymInt)), where
        assert same_size(found, known), f"{where}: {found}, not {known}"


def same_size(left: int | SymInt, right: int | SymInt) -> bool:
    return sympy.simplify(expression(left) - expression(right)) == 0


def assert_caught(step: type[Pass], work: Work, spoil: Callable[[Work], None], match: str) -> None:
    """`spoil`, done by the pass itself behind its own rewrite, is a `PassError` of that pass."""

    class Spoilt(step):  # type: ignore[valid-type, misc]
        def call(self, work: Work) -> PassResult:
            result: PassResult = super().call(work)
            spoil(work)
            return replace(result, modified=True)

    Spoilt.__module__ = step.__module__
    name = step.__module__.rpartition(".")[2]
    with pytest.raises(PassError, match=rf"^pass {name} \(after: none\): .*(?:{match})"):
        run_passes(work, [Spoilt()])


def insert(after: Node, target: Any, *args: Any, like: Node | None = None) -> Node:
    """A new call behind `after`, with the facts of `like`, and its metadata."""
    with after.graph.inserting_after(after):
        node = after.graph.call_function(target, args)
    mode = detect_fake_mode(after.meta["val"])
    assert mode is not None
    node.meta["val"] = propagate(node, mode)
    if like is not None:
        node.meta[meta.KEY] = replace(meta.get(like), border=None)
        node.meta["nn_module_stack"] = like.meta.get("nn_module_stack")
    return node


def put_behind(node: Node, target: Any, *args: Any) -> Node:
    """Everybody who read `node` reads `target(node, *args)` instead."""
    new = insert(node, target, node, *args, like=node)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new


def calls(work: Work) -> list[Node]:
    return [node for node in work.graph.graph.nodes if node.op == "call_function"]


def named(work: Work, name: str) -> Node:
    return next(node for node in work.graph.graph.nodes if node.name == name)


def border(work: Work, layer: int) -> Node:
    return next(node for node in work.graph.graph.nodes if meta.get(node).border == layer)


def write(work: Work, layer: int) -> Node:
    found = work.find(torch.ops.adept_fx.cache_write.default)
    return next(node for node in found if node.args[3] == layer)
