"""Captured programs are found again, and dropped with what they look into."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import nn

from adept_fx.runtime.fingerprint import Fingerprint
from adept_fx.runtime.programs import Programs


class Scaled(nn.Linear):
    """Lists its own settings, as PEFT's layers do."""

    other_param_names = ("scaling", "table")

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.scaling = {"default": 1.0}
        self.table = {"default": torch.ones(2)}  # cannot be compared


def model() -> nn.Module:
    return nn.Sequential(Scaled(), nn.Linear(2, 2)).eval()


def added(programs: Programs, decoder: nn.Module, form: str, program: Any) -> None:
    programs.add(form, program, Fingerprint.of(decoder))


def test_a_setting_that_is_switched_back_finds_its_program() -> None:
    programs, decoder = Programs(), model()
    added(programs, decoder, "a", "eval")
    decoder.train()
    assert programs.find("a") is None
    assert not programs.fit
    added(programs, decoder, "a", "train")
    assert programs.last == "train"
    decoder.eval()
    assert programs.find("a") == programs.last == "eval"
    assert programs.find("b") is None
    decoder[0].scaling["default"] = 2.0  # type: ignore[index]
    assert programs.find("a") is None


def test_replaced_tensors_are_let_go() -> None:
    programs, decoder = Programs(), model()
    added(programs, decoder, "a", "old")
    added(programs, decoder, "b", "old")
    gone = weakref.ref(decoder[1].weight)  # type: ignore[index]
    decoder[1].weight = nn.Parameter(torch.zeros(2, 2))  # type: ignore[index]
    assert programs.find("a") is None
    added(programs, decoder, "a", "new")
    gc.collect()
    assert gone() is None
    assert programs.fit


def test_few_are_kept() -> None:
    programs, decoder = Programs(), model()
    for number in range(20):
        added(programs, decoder, str(number), number)
    assert programs.find("0") is None
    assert programs.find("19") == 19
    programs.clear()
    assert programs.last is None
    assert programs.fit
