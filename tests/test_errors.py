"""The error classes: text, ancestry, pickling."""

from __future__ import annotations

import copy
import pickle

import pytest

from adept_fx import errors
from adept_fx.errors import AdeptError

CLASSES = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("kind", CLASSES)
def test_message_and_hint_are_both_printed(kind: type[AdeptError]) -> None:
    error = kind("layer 3 is odd", hint="make it even")
    assert str(error) == "layer 3 is odd\nWay out: make it even"
    assert (error.message, error.hint) == ("layer 3 is odd", "make it even")


@pytest.mark.parametrize("kind", CLASSES)
def test_without_a_hint_only_the_message_is_printed(kind: type[AdeptError]) -> None:
    error = kind("layer 3 is odd")
    assert str(error) == "layer 3 is odd"
    assert error.hint is None


@pytest.mark.parametrize("hint", [None, "make it even"])
@pytest.mark.parametrize("duplicate", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
@pytest.mark.parametrize("kind", CLASSES)
def test_survives_pickle_and_copy(kind, duplicate, hint) -> None:
    error = kind("layer 3 is odd", hint=hint)
    again = duplicate(error)
    assert type(again) is kind
    assert str(again) == str(error)
    assert (again.message, again.hint) == (error.message, error.hint)


@pytest.mark.parametrize("kind", CLASSES)
def test_all_can_be_caught_as_adept_error(kind: type[AdeptError]) -> None:
    assert issubclass(kind, AdeptError)


def test_what_the_caller_passed_is_a_value_error() -> None:
    names = {kind.__name__ for kind in CLASSES if issubclass(kind, ValueError)}
    assert names == {"CheckpointError", "ConfigError", "UnsupportedModelError", "InputError"}


def test_the_hint_is_keyword_only() -> None:
    with pytest.raises(TypeError):
        AdeptError("message", "hint")  # type: ignore[misc]
