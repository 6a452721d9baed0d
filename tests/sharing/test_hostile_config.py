"""Files are data: whatever is in them, `load` says what is wrong and nothing else happens."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adept_fx.errors import CheckpointError
from adept_fx.sharing.record import from_text
from shared_exits import CONFIG, made, quick, refused, rewrite_config

Values = dict[str, Any]


def put(*path: Any) -> Callable[[Values], None]:
    """Changes one place: the keys, then the new value."""
    *keys, last, value = path

    def change(values: Values) -> None:
        for key in keys:
            values = values[key]
        values[last] = value

    return change


def gate(**options: Any) -> Callable[[Values], None]:
    return put("config", "gate", 0, {"name": "mlp", "hidden_size": 32, "width": 64} | options)


WEIGHT = "lm_head.weight"
SAMPLE = ("base", "parameters", WEIGHT)
CONFIGS: dict[str, tuple[Callable[[Values], Any], str]] = {
    "newer": (put("format", 99), r"format 99; this version reads up to 1"),
    "older": (put("format", 0), "unknown format 0"),
    "format": (put("format", "1"), "format of exit_config.json must not be"),
    "no format": (lambda v: v.pop("format"), "exit_config.json is no JSON object"),
    "a list": (lambda v: [v], "no JSON object"),
    "missing": (lambda v: {k: v[k] for k in v if k != "base"}, "must have the keys"),
    "unknown": (put("surprise", 1), "must have the keys"),
    "calibration": (put("calibration", [1]), "calibration of exit_config.json must not be"),
    "base": (put("base", None), "base of exit_config.json must not be None"),
    "base key": (put("base", "more", 1), "base must have the keys"),
    "layers": (put("base", "layers", True), "layers of base must not be True"),
    "other layers": (put("base", "layers", 10**30), "has layers 3, not 1000"),
    "name": (put("base", "name", "../../etc/passwd"), "name of base must not be"),
    "kind": (put("base", "kind", "A\x1b[2JB"), "kind of base must not be"),
    "parameters": (put("base", "parameters", []), "parameters of base must not be"),
    "sample": (put(*SAMPLE, 1), "base.parameters.*must have the keys"),
    "hex": (put(*SAMPLE, "values", "zz" * 64), "malformed"),
    "short": (put(*SAMPLE, "values", ""), "malformed"),
    "shape": (put(*SAMPLE, "shape", ["128", 32]), "malformed"),
    "sha": (put("sha256", "0" * 64), "is not the file that exit_config.json was written with"),
    "config": (put("config", "exits", [2, 1]), "config in exit_config.json is invalid.*increasing"),
    "deep exits": (put("config", "exits", [1, 3]), "does not fit a model of 3 layers"),
    "field": (put("config", "hook", "os.system"), "unknown keys"),
    "threshold": (put("config", "threshold", [0.5, 7]), "must be a number in"),
    "number": (put("config", "threshold", [0.5]), "do not agree in number"),
    "gate": (put("config", "gate", [{"name": "os.system"}] * 2), "unknown gate"),
    "option": (gate(device="cuda:9"), "unknown options"),
    "huge": (gate(width=10**12), r"gates\.0\.hidden_bias' is \[64\], not"),
    "monstrous": (gate(width=10**40), "config in exit_config.json is invalid"),
    "width": (gate(hidden_size=16), "gates in exit_config.json do not fit"),
    "other width": (gate(width=32), r"is \[64\], not \[32\]"),
    "same_as": (put("config", "gate", 1, {"same_as": 0}), r"unknown \['gates\.1"),
    "same_as itself": (put("config", "gate", 0, {"same_as": 0}), "must point to an earlier gate"),
    "kv": (put("config", "kv", "eval"), "unknown kv policy"),
    "rank": (put("config", "adapter_rank", 10**9), "adapter_rank is 1000000000"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_not_ours(name: str, folder: Path) -> None:
    change, word = CONFIGS[name]
    rewrite_config(folder, change)
    refused(folder, word)


TEXTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not JSON"),
    "binary": (b"\xff\xfe\x00", "is not JSON"),
    "nan": (b'{"format": NaN}', "NaN is no JSON number"),
    "digits": (b'{"format": ' + b"9" * 10_000 + b"}", "is not JSON"),
    "deep": (b"[" * 200_000, "is not JSON"),
    "deep objects": (b'{"a":' * 200_000, "is not JSON"),
    "null": (b"null", "no JSON object"),
    "pickle": (pickle.dumps({"format": 1}), "is not JSON"),
    "large": (b" " * (17 * 2**20), "bytes, more than"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_is_no_config(name: str, folder: Path) -> None:
    data, word = TEXTS[name]
    (folder / CONFIG).write_bytes(data)
    refused(folder, word)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@quick
@given(value=json_values, data=st.data())
def test_any_value_in_any_place(saved: Path, value: Any, data: st.DataObject) -> None:
    values = json.loads((saved / CONFIG).read_text())
    place, key = values, data.draw(st.sampled_from(sorted(values)))
    while isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)))
    place[key] = value
    try:
        record = from_text(json.dumps(values).encode())
    except CheckpointError:
        return
    model = made()[0]
    assert isinstance(record.base.difference(model, model.model), str)
