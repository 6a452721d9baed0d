"""Reports say the same in every form, and the page is stable."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from adept_fx.check.child import Limits
from adept_fx.check.reasons import reason_group
from adept_fx.check.report import (
    STATUSES,
    Report,
    from_json,
    summary_line,
    to_json,
    to_markdown,
    to_table,
)
from adept_fx.check.result import CheckResult

STEPS = {"off": "ok", "exits": "ok", "generate": "ok", "restore": "ok"}
RESULTS = (
    CheckResult(
        "llama",
        "passed",
        steps=STEPS,
        facts={"model_class": "LlamaForCausalLM", "layer_kinds": ["full_attention"]},
        seconds=3.5,
    ),
    CheckResult("aaa", "refused", "layers 0, 1 of AaaModel carry state Way out: take B", seconds=1),
    CheckResult("bbb", "refused", "layers 2 of BBBModel carry state Way out: take C", seconds=2),
    CheckResult("ccc", "refused", "CccModel is an encoder-decoder", seconds=3),
    CheckResult("ddd", "failed", "exits: a | b differ in <layer 3>\nby `much`", seconds=4),
    CheckResult("eee", "unavailable", "ImportError: no module named 'eee_cuda'", seconds=5),
    CheckResult(
        "gemma2",
        "passed",
        steps=STEPS,
        facts={"layer_kinds": ["full_attention", "sliding_attention"]},
        seconds=6.0,
    ),
)


def a_report(results: tuple[CheckResult, ...] = RESULTS) -> Report:
    return Report.of(results, "adept-fx check", Limits(8.0, 600.0))


def rows(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_results_are_in_the_order_of_their_subjects() -> None:
    subjects = ["aaa", "bbb", "ccc", "ddd", "eee", "gemma2", "llama"]
    assert [result.subject for result in a_report().results] == subjects
    assert a_report() == a_report(RESULTS[::-1])


def test_json_gives_the_report_again() -> None:
    report = a_report()
    again = from_json(to_json(report))
    assert again == report
    assert to_json(again) == to_json(report)
    assert list(json.loads(to_json(report))["versions"]) == ["torch", "transformers"]


def test_json_rounds_seconds() -> None:
    (result,) = json.loads(to_json(a_report((replace(RESULTS[0], seconds=1.2345),))))["results"]
    assert result["seconds"] == 1.2


def test_the_page_follows_from_the_json_and_has_no_timings() -> None:
    report = a_report()
    slower = a_report(tuple(replace(result, seconds=1e4) for result in RESULTS))
    assert to_markdown(from_json(to_json(report))) == to_markdown(report)
    assert to_markdown(slower) == to_markdown(report)


def test_the_page_says_how_it_was_made() -> None:
    page = to_markdown(replace(a_report(), versions={"torch": "2.13.0", "transformers": "5.0"}))
    assert page.startswith("# ")
    assert "Made by `adept-fx check` with torch 2.13.0 and transformers 5.0" in page
    assert "at most 8 GiB and 600 s" in page
    assert page.endswith("|\n")


def test_the_page_counts_each_status_and_each_group_of_refusals() -> None:
    summary = rows(to_markdown(a_report()))[2:8]
    assert [cells[:2] for cells in summary] == [
        ["**passed**", "2"],
        ["**refused**", "3"],
        ["", "2"],
        ["", "1"],
        ["**unavailable**", "1"],
        ["**failed**", "1"],
    ]
    assert [cells[2] for cells in summary[2:4]] == [
        "layers … of … carry state",
        "… is an encoder-decoder",
    ]


def test_the_page_has_a_row_per_model() -> None:
    models = rows(to_markdown(a_report()))[10:]
    assert [cells[0] for cells in models] == [f"`{r.subject}`" for r in a_report().results]
    assert models[-1] == ["`llama`", "LlamaForCausalLM", "passed", "full_attention", ""]
    assert models[-2][3] == "full_attention, sliding_attention"
    assert models[0][4] == "layers 0, 1 of AaaModel carry state"
    assert models[3][4] == r"exits: a \| b differ in &lt;layer 3> by \`much\`"


@given(st.text(max_size=400))
def test_any_reason_is_one_cell(reason: str) -> None:
    result = CheckResult("x", "refused", reason)
    for cells in rows(to_markdown(a_report((result,))))[-1:]:
        assert len(cells) == 5
    assert len(rows(to_markdown(a_report((result,))))) == 2 + len(STATUSES) + 1 + 2 + 1


def test_the_table_has_every_model() -> None:
    target = StringIO()
    Console(file=target, width=200).print(to_table(a_report()))
    lines = target.getvalue().splitlines()
    assert lines[0].strip() == "7 checked: 2 passed, 3 refused, 1 unavailable, 1 failed"
    for result in a_report().results:
        (line,) = [line for line in lines if f"│ {result.subject} " in line]
        assert result.status in line


def test_the_summary_of_nothing() -> None:
    assert summary_line(a_report(())) == "nothing checked"


@pytest.mark.parametrize(
    ("reason", "group"),
    [
        ("layers 0, 2, 5 of MambaModel carry state Way out: …", "layers … of … carry state"),
        ("layer 3 reads add_12 of layer 1 besides it", "layer … reads … of layer … besides it"),
        ("pass find_layers (after: normalize): no cut", "pass find_layers"),
        ("XYZModel has none that get_decoder() finds", "… has none that get_decoder() finds"),
        ("model.layers.3.rope of OPTDecoder is odd ('x y')", "… of … is odd"),
        ("the KV of a row", "the KV of a row"),
        ("", ""),
    ],
)
def test_a_group_is_the_reason_without_names_and_numbers(reason: str, group: str) -> None:
    assert reason_group(reason) == group
