"""Files are data: whatever is in them, `load` says what is wrong and nothing else happens."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import adept_fx
from adept_fx.errors import CheckpointError
from adept_fx.sharing.record import from_text
from adept_fx.sharing.tensors import from_bytes
from shared_exits import CONFIG, TENSORS, made, rewrite_config, rewrite_tensors

Values = dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exits")
    adept_fx.save(made("mlp")[1], folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def refused(folder: Path, word: str) -> None:
    model = made()[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = set(vars(model))
    with pytest.raises(CheckpointError, match=word):
        adept_fx.load(model, folder)
    assert set(vars(model)) == attributes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


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


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


def header(values: Any, data: bytes = b"") -> bytes:
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"gates.0.weight": {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}}


RAW: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x08\x00",
    "garbage": b"\x93NUMPY" * 100,
    "header beyond the file": struct.pack("<Q", 2**40) + b"{}",
    "header of a huge length": struct.pack("<Q", 2**64 - 1),
    "no json": header(b"{not json"),
    "deep": header(b'{"a":' * 100_000),
    "a list": header([1]),
    "beyond the data": header(entry("F32", [8], 0, 32), b"\0" * 8),
    "negative": header(entry("F32", [-8], 0, 32), b"\0" * 32),
    "overflow": header(entry("F32", [2**62, 2**62], 0, 32), b"\0" * 32),
    "other size": header(entry("F32", [9], 0, 32), b"\0" * 32),
    "unknown dtype": header(entry("PY_OBJECT", [8], 0, 32), b"\0" * 32),
    "rest": header({}, b"\0" * 32),
}


@pytest.mark.parametrize("name", RAW)
def test_bytes_that_are_no_tensors(name: str, folder: Path) -> None:
    rewrite_tensors(folder, RAW[name])
    refused(folder, "tensors cannot be read|do not fit their config")


@pytest.mark.parametrize("protocol", ["pickle", "torch"])
def test_a_pickle_is_never_opened(protocol: str, folder: Path, tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "boom")
    if protocol == "pickle":
        data = pickle.dumps(bomb)
    else:
        torch.save({"gates.0.weight": bomb}, tmp_path / "data.pt")
        data = (tmp_path / "data.pt").read_bytes()
    rewrite_tensors(folder, data)
    refused(folder, "tensors cannot be read")
    assert not (tmp_path / "boom").exists()


def only(name: str, value: Any) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: value(tensors.get(name))})


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "nan": (only("gates.1.bias", lambda t: t * float("nan")), "gates.1.bias' holds values that"),
    "inf": (only("gates.1.bias", lambda t: t / 0), "gates.1.bias' holds values that are not"),
    "missing": (lambda t: {n: t[n] for n in t if n != "gates.1.bias"}, "missing .'gates.1.bias"),
    "none": (lambda t: {"x": t["gates.1.bias"]}, "missing .'gates.0"),
    "unknown gate": (only("gates.2.bias", lambda t: torch.zeros(1)), "unknown .'gates.2.bias"),
    "unknown": (only("stranger", lambda t: torch.zeros(1)), "unknown .'stranger"),
    "shape": (only("gates.0.weight", lambda t: t[:-1].clone()), r"is \[63\], not \[64\]"),
    "dimension": (only("gates.0.weight", lambda t: t[None].clone()), r"is \[1, 64\], not \[64\]"),
    "kind": (only("gates.0.weight", lambda t: t.long()), "is torch.int64, which is no"),
    "float8": (only("gates.0.weight", lambda t: t.to(torch.float8_e4m3fn)), "float8.*is no"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_tensors_that_do_not_fit(name: str, folder: Path) -> None:
    change, word = CHANGES[name]
    rewrite_tensors(folder, change)
    refused(folder, word)


def test_damaged_tensors_are_noticed(folder: Path) -> None:
    data = bytearray((folder / TENSORS).read_bytes())
    data[-1] ^= 1  # still a good file, of another number
    (folder / TENSORS).write_bytes(data)
    refused(folder, "is not the file that")


def _gone(file: Path) -> None:
    file.unlink()


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def _endless(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def _sparse(file: Path) -> None:
    os.truncate(file, 2**40)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
@pytest.mark.parametrize("spoil", [_gone, _folder, _pipe, _dangling, _endless, _sparse])
def test_what_is_no_file(spoil: Callable[[Path], None], name: str, folder: Path) -> None:
    spoil(folder / name)
    refused(folder, f"there is no {name}|is no file|bytes, more than")


quick = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@quick
@given(data=st.data())
def test_truncated_and_altered_bytes(saved: Path, data: st.DataObject) -> None:
    """Of both files, without the hash: each reader stands for itself."""
    for name, read in ((CONFIG, from_text), (TENSORS, from_bytes)):
        good = (saved / name).read_bytes()
        cut = data.draw(st.integers(0, len(good) - 2))  # the last byte of the text is a newline
        with pytest.raises(CheckpointError):
            read(good[:cut])
        at, value = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, 255))
        try:
            read(good[:at] + bytes([value]) + good[at + 1 :])
        except CheckpointError:
            continue


@quick
@given(data=st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        from_text(data)
    try:
        from_bytes(data)
    except CheckpointError:
        return
    assert data[8:].strip() == b"{}"


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
