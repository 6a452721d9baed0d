"""Tiny models whose layers keep or pass on more than keys and values, and talks with them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import adept_fx
from adept_fx.check.model import randomize
from adept_fx.check.tiny import tiny_config
from adept_fx.gates import Replay
from dialogue import THRESHOLD, Case, Script, assert_trace_equal, play, play_oracle, script
from product import PLANS, play_product
from toys import Noting, Prepared, Toy, Twice, toy

# Per type: layers and exits, few and early, so that stages of one layer lie behind each other.
SIZES: dict[str, tuple[int, tuple[int, ...]]] = {
    "qwen3_next": (3, (1, 2)),  # gated delta nets and attention
    "lfm2": (3, (1, 2)),  # short convolutions and attention
    "jamba": (3, (1, 2)),  # state space models and attention
    "gemma4_text": (4, (1, 3)),  # the last two layers read keys of the first two
    "deepseek_v32": (2, (1,)),  # index keys
    "diffllama": (3, (1, 2)),  # two attention calls on the same keys
    "gpt_neo": (3, (1, 2)),  # counts its keys itself
    "a note": (3, (1, 2)),  # the first layer makes it, all others read it
    "pieces": (3, (1, 2)),  # made before the layers, of the embedding and of `input_ids`
    "two calls": (3, (1, 2)),  # of different scale, on the same keys
}
TOYS: dict[str, type[Toy]] = {"a note": Noting, "pieces": Prepared, "two calls": Twice}
# Experts take long to trace, and other tests have them.
WITHOUT_EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_next": {"mlp_only_layers": [0, 1, 2]},
    "deepseek_v32": {"mlp_layer_types": ["dense", "dense"]},
}
STATIC = ("lfm2", "gemma4_text", "gpt_neo")
CASE = Case(lengths=(9, 4, 7), side="left", steps=0)
MOODS = ("mixed", "first", "first", "stay", "mixed", "last", "stay")


def cases(model_type: str) -> dict[str, Script]:
    """A talk with each kind of step, and prompts in chunks, alone, and without a cache."""
    exits = len(SIZES[model_type][1])
    alone = replace(CASE, lengths=(7,), steps=3, seed=3)
    talks = {
        "steps": moody(CASE, exits),
        "chunks": script(replace(CASE, chunk=4, steps=2, extra=1, head=False, seed=1), exits),
        "alone": script(alone, exits),
        "no cache": script(replace(CASE, lengths=(3, 6), cache="none", seed=2), exits),
    }
    if model_type in STATIC:
        talks["static"] = moody(replace(CASE, cache="static", seed=4), exits)
    return talks


def moody(case: Case, exits: int, moods: tuple[str, ...] = MOODS) -> Script:
    """A prompt, of which some tokens leave early, then a step in each mood.

    ``"first"`` and ``"last"``: all leave there, so that all stages behind are skipped.
    """
    spoken = script(replace(case, steps=len(moods)), exits)
    for mood, scores in zip(moods, spoken.scores[1:], strict=True):
        if mood != "mixed":
            scores.fill_(0.1)
        if mood in ("first", "last"):
            scores[0 if mood == "first" else -1].fill_(0.9)
        if mood == "mixed":  # one row goes on, the others leave at the first exit point
            scores.fill_(0.9)[:, 0] = 0.1
    return spoken


@cache
def raw(model_type: str) -> PreTrainedModel:
    if model_type in TOYS:
        made: PreTrainedModel = toy(TOYS[model_type], SIZES[model_type][0])
        return made
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = tiny_config(model_type, SIZES[model_type][0])
        for name, value in WITHOUT_EXPERTS.get(model_type, {}).items():
            setattr(config, name, value)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model)
    return model


@cache
def rewritten(model_type: str) -> Any:
    exits = SIZES[model_type][1]
    config = adept_fx.ExitConfig(exits=exits, gate=Replay([]), threshold=THRESHOLD)
    return adept_fx.transform(raw(model_type), config)


def check_exits(model_type: str, spoken: Script, name: str) -> None:
    """Every plan says what the oracle says, of states, caches and depths."""
    want = play_oracle(raw(model_type), SIZES[model_type][1], spoken)
    ee = rewritten(model_type)
    for plan in PLANS:
        ee.adept.stats.reset()
        got = play_product(ee, spoken, plan)
        assert_trace_equal(got, want, spoken, f"{model_type} plan={plan} {name}")
        stats = ee.adept.stats
        if plan == "compact":
            assert stats.executed_token_layers == stats.needed_token_layers


def check_never(model_type: str, spoken: Script, name: str) -> None:
    """Nothing leaves: the dense plan is the original bit for bit, auto within rounding."""
    layers, ee = SIZES[model_type][0], rewritten(model_type)
    want = play(raw(model_type), spoken)
    want.depths = [turn.real * layers for turn in spoken.turns]
    for plan in ("dense", "auto"):
        got = play_product(ee, spoken, plan, threshold=1.0)
        what = f"{model_type} plan={plan} {name} never"
        assert_trace_equal(got, want, spoken, what, bitwise=plan == "dense")


def leaving(spoken: Script, wants: list[Tensor]) -> Script:
    """The same talk, with these exits."""
    return replace(spoken, scores=[0.1 + 0.8 * want.float() for want in wants])
