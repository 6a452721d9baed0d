"""How an explanation reads: of what is refused, of a live model, in a terminal; how long it is."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from functools import cache
from typing import Any

import pytest
from rich.console import Console
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, GPT2Model

import adept_fx
from adept_fx import AdeptError, ExitConfig
from adept_fx.errors import InputError, PassError, during
from adept_fx.gates.registry import build_gates
from adept_fx.report.explanation import Explanation
from adept_fx.report.facts import Crossing, Exit, Gate, Layer, Note, Projection, Slot, Stage
from adept_fx.report.words import count, ranges
from adept_fx.runtime.handle import Adept
from intact import intact
from models import tiny
from toys import RowNoting, toy


class Peeking(GPT2Model):
    """Does something else for some tokens: that cannot be traced."""

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **other: Any) -> Any:  # type: ignore[override]
        if int(input_ids.max()) > 1000:
            raise ValueError
        return super().forward(input_ids, past_key_values, **other)


def peeking() -> Any:
    model: Any = tiny("gpt2", layers=2)
    model.transformer = Peeking(model.config).eval()
    return model


def encoder_decoder() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", vocab_size=64, **sizes))  # type: ignore[no-untyped-call]


@cache
def gpt2() -> Any:
    return tiny("gpt2", layers=2)


FIRST = {"exits": (1,)}
REFUSED: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "no model": (lambda: nn.Linear(2, 2), FIRST, "model", "not a transformers model"),
    "encoder-decoder": (encoder_decoder, FIRST, "model", "is an encoder-decoder"),
    "exits": (gpt2, {"exits": (2,)}, "config", "2 is not in 1..1"),
    "gate": (gpt2, FIRST | {"gate": adept_fx.gates.MLP(16)}, "gates", "hidden size 16"),
    "no head": (lambda: gpt2().transformer, FIRST | {"gate": "max_prob"}, "gates", "no head"),
    "capture": (peeking, FIRST, "capture", "cannot trace Peeking"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_model(name: str) -> None:
    make, options, step, words = REFUSED[name]
    model, config = make().eval(), ExitConfig(**options)
    with intact(model):
        found = adept_fx.explain(model, config)
    assert not found.accepted
    assert (found.layers, found.stages, found.exits) == ((), (), ())
    refusal = found.refusal
    assert refusal is not None
    assert refusal.step == step
    assert words in refusal.message
    assert found.to_dict()["refusal"]["message"] == refusal.message
    text = str(found)
    assert words in text
    assert repr(step) in text
    assert refusal.hint is None or f"way out  {refusal.hint}" in text


def test_a_pass_refuses() -> None:
    refusal = adept_fx.explain(toy(RowNoting, layers=2), ExitConfig(exits=(1,))).refusal
    assert refusal is not None
    assert (refusal.step, refusal.error) == ("pass compact_tokens", "UnsupportedModelError")


@pytest.mark.parametrize("name", ["no model", "exits", "gate"])
def test_the_refusal_is_the_error_of_transform(name: str) -> None:
    make, options, _, _ = REFUSED[name]
    refusal = adept_fx.explain(make(), ExitConfig(**options)).refusal
    with pytest.raises(AdeptError) as raised:
        adept_fx.transform(make(), ExitConfig(**options))
    error = raised.value
    assert refusal is not None
    assert (refusal.error, refusal.message) == (type(error).__name__, error.message)
    assert refusal.hint == error.hint


def test_what_is_known_of_a_refused_model() -> None:
    found = adept_fx.explain(gpt2(), ExitConfig(exits=(2,)))
    size = sum(parameter.numel() for parameter in gpt2().transformer.parameters())
    known = (found.model, found.decoder, found.num_layers, found.parameters)
    assert known == ("GPT2LMHeadModel", "GPT2Model", 2, size)
    assert adept_fx.explain(nn.Linear(2, 2)).decoder is None
    wrong: Any = {"exits": (1,)}
    assert adept_fx.explain(gpt2(), wrong).refusal is not None


def test_the_innermost_step_is_kept() -> None:
    assert AdeptError("nothing").step is None
    with pytest.raises(PassError) as caught, during("outer"), during("inner"):
        raise PassError("no")
    assert caught.value.step == "inner"
    with pytest.raises(ValueError, match="other"), during("step"):
        raise ValueError("other")


def test_a_long_message_is_cut_in_the_text_alone() -> None:
    found = adept_fx.explain(gpt2(), ExitConfig(exits=(2,)))
    assert found.refusal is not None
    message = "\n".join(f"line {at}" for at in range(50))
    long = replace(found, refusal=replace(found.refusal, message=message))
    assert len(str(long).splitlines()) < 15
    assert long.to_dict()["refusal"]["message"] == message


def test_a_live_model() -> None:
    config = ExitConfig(exits=(1,), threshold=0.5, prefill_threshold=1.0)
    ee = adept_fx.transform(tiny("llama", layers=3), config)
    text = repr(ee.adept)
    for words in ("not compiled", "0.5; in prefill 1.0", "auto", "2 layers: merged", "gate mlp"):
        assert words in text
    assert "exits off for now" not in text
    found = ee.adept.explain()
    calls = [n for n in ee.adept.graph.kv_0.graph.graph.nodes if n.op.startswith("call")]
    assert found.exits[0].nodes == len(calls)
    ee.adept.thresholds, ee.adept.plan = 0.25, "dense"
    with ee.adept.disabled():
        assert "dense, kv synthesize, exits off for now" in repr(ee.adept)
        assert "0.25; in prefill 1.0" in repr(ee.adept)
    assert repr(ee.adept).splitlines()[1].strip() in repr(ee)  # indented there
    _check_compiled(ee, found)


def _check_compiled(ee: Any, before: Explanation) -> None:
    ee.adept.compile(backend="eager")
    after = ee.adept.explain()
    assert after.compiled
    assert "compiled" in repr(ee.adept).splitlines()[0].split(", ")
    assert [item.form for item in after.exits[0].projections] == ["stacked"] * 2
    sizes = [
        [(i.computed, i.columns, i.layers) for i in e.exits[0].projections] for e in (before, after)
    ]
    assert sizes[0] == sizes[1]
    assert after.exits[0].skipped_parameters == before.exits[0].skipped_parameters
    ee.adept.uncompile()
    assert "thresholds" in repr(ee.adept)  # without a capture, and without making one
    assert "stage" not in repr(ee.adept)


def test_a_handle_without_a_model() -> None:
    config = ExitConfig(exits=(1,), gate="cosine").resolve(2)
    handle = Adept(config, build_gates(config, 32))
    assert repr(handle) == "exits       1\nthresholds  1.0\nplan        auto, kv synthesize"
    with pytest.raises(InputError):
        handle.explain()


def large(layers: int, equal: bool) -> Explanation:
    """An explanation of a deep model with an exit after each layer."""
    kinds = ("full_attention",)
    exits = tuple(
        Exit(
            after=after,
            gate=Gate("mlp", 10**6, ()),
            nodes=9,
            slots=tuple(Slot(at, "key_value", ((2, 8), (2, 8))) for at in range(after, layers)),
            projections=tuple(
                Projection(f"layers.*.{i}.weight", layers - after, "plain", 8, 8, "")
                for i in range(20)
            ),
            crossing=tuple(
                Crossing(f"v{i}", None, f"layers {i}..{i}", "tokens") for i in range(20)
            ),
            skipped_parameters=5,
            skipped_share=0.5,
        )
        for after in range(1, layers)
    )
    return Explanation(
        model="Model",
        decoder="Decoder",
        num_layers=layers,
        parameters=10**9,
        container="layers",
        layers=tuple(Layer(at, 7 if equal else at, kinds) for at in range(layers)),
        stages=tuple(Stage(at, at, 7, {"full_attention": 1}) for at in range(layers)),
        exits=exits,
        notes=tuple(Note("slow", f"reason {at}") for at in range(20)),
    )


def test_it_is_never_long() -> None:
    from adept_fx.report import text

    found = large(32, equal=False)
    settings = [("thresholds", "0.5"), ("plan", "auto")]
    lines = text.plain(text.rows(found, settings)).splitlines()
    assert len(lines) <= 40
    assert "exit 1 " in str(found)
    assert "exit 31 " in str(found)
    assert "stage 31 " in str(found)
    shown = sum(line.startswith("exit") for line in lines)
    assert f"... {31 - shown} more exit points ..." in str(found)
    assert "layers      0..31: full attention, 7 parameters" in "\n".join(
        text.plain(text.rows(large(32, equal=True), settings)).splitlines()
    )


def test_in_a_terminal() -> None:
    console = Console(width=60, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(large(4, equal=True))
    printed = console.export_text()
    assert "Decoder" in printed
    assert all(len(line) <= 60 for line in printed.splitlines())


def test_it_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        large(2, equal=True).model = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([], ""),
        ([4], "4"),
        ([0, 1, 2, 3], "0..3"),
        ([0, 2, 3, 7], "0, 2..3, 7"),
        ([1, 3, 5, 7, 9], "1, 3, .., 9"),
        ([1, 3, 5], "1, 3, 5"),
        ([0, 1, 3, 4, 6, 7, 9, 10], "0..1, 3..4, 6..7, 9..10"),
    ],
)
def test_ranges(numbers: list[int], words: str) -> None:
    assert ranges(numbers) == words


def test_counts() -> None:
    assert [count(n) for n in (0, 12345, 1_240_000, 8_030_261_248)] == [
        "0",
        "12,345",
        "1.24M",
        "8.03B",
    ]
