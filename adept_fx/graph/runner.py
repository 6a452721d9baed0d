"""Runs passes in order: checks, lints, refreshes metadata, verifies, times and dumps."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensorMode
from torch.fx import Node
from torch.fx.node import map_arg

from adept_fx.errors import AdeptError, PassError, during
from adept_fx.graph.base import Pass, PassResult, Work
from adept_fx.graph.dump import dump
from adept_fx.graph.verify import verify

DEBUG_VARIABLE = "ADEPT_FX_DEBUG"


@dataclass(frozen=True)
class PassRecord:
    """What one pass did and how long it took, in seconds."""

    name: str
    seconds: float
    modified: bool
    counts: dict[str, int] = field(default_factory=dict)


def run_passes(work: Work, passes: Sequence[Pass]) -> list[PassRecord]:
    """Runs ``passes`` on ``work``, in place.

    With the environment variable ``ADEPT_FX_DEBUG=dir``, writes the graph before the first and
    after each pass to numbered files in that folder.

    Raises:
        PassError: A pass was given a graph that it is not made for, or broke a guarantee. The
            message names the pass and those before it.
        UnsupportedModelError: A pass refuses the model.
    """
    folder = os.environ.get(DEBUG_VARIABLE)
    target = Path(folder) if folder else None
    records: list[PassRecord] = []
    dump(work, target, 0, "captured")
    for number, step in enumerate(passes, start=1):
        began = time.perf_counter()
        with during(f"pass {step.name}"):
            try:
                result = _run(work, step)
            except PassError as error:
                before = ", ".join(record.name for record in records) or "none"
                raise PassError(f"pass {step.name} (after: {before}): {error}") from error
        seconds = time.perf_counter() - began
        records.append(PassRecord(step.name, seconds, result.modified, result.counts))
        dump(work, target, number, step.name, records[-1])
    return records


def _run(work: Work, step: Pass) -> PassResult:
    if work.stage < step.needs:
        raise PassError(f"needs a graph at {step.needs.name}, got {work.stage.name}")
    step.requires(work)
    try:
        result = step.call(work)
        if result.modified:
            work.graph.graph.lint()
            refresh(work.graph)
            work.graph.recompile()
    except AdeptError:
        raise
    except Exception as error:
        # The first line: what lint raises goes on with the whole graph.
        reason = (str(error).splitlines() or [""])[0]
        raise PassError(f"failed: {type(error).__name__}: {reason}") from error
    work.stage = max(work.stage, step.reaches)
    step.ensures(work)
    verify(work)
    return result


def refresh(module: fx.GraphModule) -> None:
    """Gives every node without metadata its fake value, from its inputs'."""
    missing = [
        node
        for node in module.graph.nodes
        if node.op == "call_function" and "val" not in node.meta and _is_op(node)
    ]
    if not missing:
        return
    known = [node.meta["val"] for node in module.graph.nodes if "val" in node.meta]
    mode = detect_fake_mode(known)
    if mode is None:
        raise PassError("the graph has no fake tensors to propagate")
    for node in missing:
        node.meta["val"] = propagate(node, mode)


def _is_op(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)


def propagate(node: Node, mode: FakeTensorMode) -> object:
    """The fake value of an op, computed from the fake values of its inputs."""
    arguments = map_arg(node.args, lambda i: i.meta["val"])
    keywords = map_arg(node.kwargs, lambda i: i.meta["val"])
    with mode, torch.no_grad():
        return node.target(*arguments, **keywords)  # type: ignore[operator]
