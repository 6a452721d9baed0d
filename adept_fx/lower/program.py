"""``ee.adept.compile``: gives every part of an exit-aware graph a compiled form."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from adept_fx.graph.blocks import Block, Stage, Synthesis
from adept_fx.lower.forms import Forms
from adept_fx.lower.leaving import CompiledSynthesis
from adept_fx.lower.stacks import Stacks, stack
from adept_fx.lower.stage import CompiledStage, Functions
from adept_fx.pipeline import Program

_COMPARED = ("self", "L['self']", "G[", "dict(type(")


def compile_program(program: Program, stacks: Stacks, options: dict[str, Any]) -> None:
    """Compiles the parts of a program in place, each at its first call.

    The choice of tokens and plans stays on the host between the parts.
    """
    functions = Functions(options)
    stages = [block for block in program.graph.children() if isinstance(block, Stage)]
    for index, stage in enumerate(stages):
        stage.use(CompiledStage(stage, index, functions))
    for block in program.graph.children():
        if isinstance(block, Synthesis):
            stack(block, stacks)
            skipped = [stage for stage in stages if stage.layers.start >= block.layers.start]
            block.use(CompiledSynthesis(block, skipped, options))
        elif isinstance(block, Block) and not isinstance(block, Stage):
            block.use(Forms(block.graph, options, own=len(block.sources)))


def compile_options(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``torch.compile`` for one part.

    Sizes are symbols from the start. Guards on modules and parameters are left out: the graphs own
    none, and what they refer to is compared before every call (see
    :mod:`adept_fx.runtime.fingerprint`). Looking at all of them again, once per stage, would take
    a few percent of a decode step.
    """
    given: dict[str, Any] = {"dynamic": True, **options}
    if given.get("backend", "inductor") != "inductor":
        return given if mode is None else given | {"mode": mode}
    chosen = dict(given.pop("options", None) or {})
    if mode is not None:
        chosen = torch._inductor.list_mode_options(mode, given["dynamic"]) | chosen
    chosen.setdefault("guard_filter_fn", _guards)
    return given | {"options": chosen}


def _guards(entries: Sequence[Any]) -> list[bool]:
    """Drops guards on what is compared elsewhere: the graph's own modules, code, parameters."""
    return [
        not (entry.name.startswith(_COMPARED) or isinstance(entry.value, nn.Parameter))
        for entry in entries
    ]
