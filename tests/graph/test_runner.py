"""The runner: order, checks, metadata, records and dumps."""

from __future__ import annotations

import ast
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.fx import Node

from adept_fx.capture import Capture, capture
from adept_fx.errors import PassError, UnsupportedModelError
from adept_fx.graph.base import Pass, PassResult, Stage, Work
from adept_fx.graph.runner import DEBUG_VARIABLE, run_passes
from adept_fx.kv import KVPolicy
from adept_fx.passes.compact_tokens import CompactTokens
from adept_fx.passes.find_layers import FindLayers
from adept_fx.passes.fold_attention import FoldAttention
from adept_fx.passes.normalize import Normalize
from adept_fx.pipeline import PIPELINE, start
from models import tiny

NAMES = [step.__module__.rpartition(".")[2] for step in PIPELINE]


@cache
def captured() -> Capture:
    return capture(tiny("llama", layers=2).get_decoder(), positions=True)


def fresh() -> Work:
    work = start(captured(), (1,), (frozenset(),), KVPolicy())
    return replace(work, graph=deepcopy(work.graph))


class Probe(Pass):
    """Does what it is told, to a normalized graph."""

    needs = Stage.CAPTURED
    reaches = Stage.CAPTURED

    def call(self, work: Work) -> PassResult:
        first = next(node for node in work.graph.graph.nodes if node.op == "call_function")
        return PassResult(self.change(work, first))

    def change(self, work: Work, node: Node) -> bool:
        return False


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([FindLayers], r"pass find_layers \(after: none\): needs a graph at NORMALIZED.*CAPTURED"),
        (
            [Normalize, FoldAttention],
            r"pass fold_attention \(after: normalize\): needs a graph at HOISTED, got NORMALIZED",
        ),
        (
            [Normalize, FindLayers, CompactTokens],
            r"pass compact_tokens \(after: normalize, find_layers\): .*SYNTHESIZED, got LAYERED",
        ),
    ],
)
def test_a_wrong_order_is_refused(steps: list[type[Pass]], message: str) -> None:
    with pytest.raises(PassError, match=message):
        run_passes(fresh(), [step() for step in steps])


@pytest.mark.parametrize("left_out", PIPELINE[:-1])
def test_no_pass_can_be_left_out(left_out: type[Pass]) -> None:
    steps = [step() for step in PIPELINE if step is not left_out]
    with pytest.raises(PassError, match="needs a graph at"):
        run_passes(fresh(), steps)


def test_a_pass_that_fails_is_named() -> None:
    class Fails(Probe):
        def change(self, work: Work, node: Node) -> bool:
            raise ZeroDivisionError("by nothing")

    message = r"pass test_runner \(after: normalize\): failed: ZeroDivisionError: by nothing"
    with pytest.raises(PassError, match=message) as info:
        run_passes(fresh(), [Normalize(), Fails()])
    assert isinstance(info.value.__cause__, PassError)


def test_a_refusal_is_not_a_failure_of_the_pass() -> None:
    class Refuses(Probe):
        def change(self, work: Work, node: Node) -> bool:
            raise UnsupportedModelError("layer 3 is odd")

    with pytest.raises(UnsupportedModelError, match=r"^layer 3 is odd$"):
        run_passes(fresh(), [Refuses()])


def test_what_requires_and_ensures_raise_names_the_pass() -> None:
    class Requires(Probe):
        def requires(self, work: Work) -> None:
            raise PassError("no exits")

    class Ensures(Probe):
        def ensures(self, work: Work) -> None:
            raise PassError("something is left")

    for step, message in ((Requires(), "no exits"), (Ensures(), "something is left")):
        with pytest.raises(PassError, match=rf"pass test_runner \(after: none\): {message}"):
            run_passes(fresh(), [step])


def test_a_malformed_graph_is_a_failure_of_the_pass() -> None:
    class UsesBeforeDefinition(Probe):
        def change(self, work: Work, node: Node) -> bool:
            output = work.graph.graph.output_node()
            node.replace_input_with(node.all_input_nodes[0], output.all_input_nodes[0])
            return True

    with pytest.raises(PassError, match=r"pass test_runner \(after: normalize\)"):
        run_passes(fresh(), [Normalize(), UsesBeforeDefinition()])


def test_an_op_that_cannot_be_propagated_is_a_failure_of_the_pass() -> None:
    class AddsNonsense(Probe):
        def change(self, work: Work, node: Node) -> bool:
            state = work.graph.graph.output_node().all_input_nodes[0]
            with work.graph.graph.inserting_after(state):
                bad = work.graph.graph.call_function(torch.ops.aten.mm.default, (state, state))
            work.graph.graph.output_node().replace_input_with(state, bad)
            return True

    with pytest.raises(PassError, match=r"pass test_runner \(after: normalize\)"):
        run_passes(fresh(), [Normalize(), AddsNonsense()])


def test_the_verifier_of_earlier_stages_still_counts() -> None:
    class DropsTheWrites(Probe):
        def change(self, work: Work, node: Node) -> bool:
            embeds = next(n for n in work.graph.graph.nodes if n.name == "inputs_embeds")
            state = work.graph.graph.output_node().all_input_nodes[0]
            state.replace_all_uses_with(embeds)
            work.graph.graph.eliminate_dead_code()
            return True

    with pytest.raises(PassError, match="the decoder writes no cache"):
        run_passes(fresh(), [Normalize(), DropsTheWrites()])


def test_new_nodes_get_metadata_and_the_code_is_new() -> None:
    class Negates(Probe):
        def change(self, work: Work, node: Node) -> bool:
            state = work.graph.graph.output_node().all_input_nodes[0]
            with work.graph.graph.inserting_after(state):
                new = work.graph.graph.call_function(torch.ops.aten.neg.default, (state,))
            work.graph.graph.output_node().replace_input_with(state, new)
            return True

    work = fresh()
    records = run_passes(work, [Normalize(), Negates()])
    (new,) = work.graph.graph.output_node().all_input_nodes
    assert new.target is torch.ops.aten.neg.default
    old = new.all_input_nodes[0].meta["val"]
    assert (new.meta["val"].shape, new.meta["val"].dtype) == (old.shape, old.dtype)
    assert work.graph.code.strip().endswith(f"return ({new.name},)")
    assert [record.modified for record in records] == [True, True]


def test_records_name_the_passes_in_order() -> None:
    records = run_passes(fresh(), [step() for step in PIPELINE])
    assert [record.name for record in records] == NAMES
    assert all(record.seconds > 0 and record.modified and record.counts for record in records)


def test_dumps_are_numbered_and_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new" / "dumps"
    monkeypatch.setenv(DEBUG_VARIABLE, str(folder))
    run_passes(fresh(), [step() for step in PIPELINE])
    files = sorted(path.name for path in folder.iterdir())
    numbered = [f"{number:02d}_{name}.py" for number, name in enumerate(["captured", *NAMES])]
    assert files == numbered
    texts = {name: (folder / name).read_text() for name in files}
    for name, text in texts.items():
        ast.parse(text)
        assert text.startswith(f"# after pass {int(name[:2])}: {name[3:-3]}; stage ")
        assert "def forward(self" in text
    assert "assert_tensor_metadata" in texts[files[0]]
    assert "assert_tensor_metadata" not in texts[files[1]]
    assert "modified=True, {'layers': 2" in texts[files[2]]
    for part in ("stage_0", "stage_1", "kv_0", "epilogue"):
        assert f"# {part}" in texts[files[-1]]


def test_without_the_variable_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(DEBUG_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    run_passes(fresh(), [Normalize()])
    assert not list(tmp_path.iterdir())


def test_a_dump_shows_the_graph_before_a_pass_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DEBUG_VARIABLE, str(tmp_path))
    with pytest.raises(PassError):
        run_passes(fresh(), [Normalize(), FoldAttention()])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00_captured.py", "01_normalize.py"]
