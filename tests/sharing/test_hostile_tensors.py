"""Tensors are data: whatever their file holds, `load` says what is wrong and does nothing else."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adept_fx.errors import CheckpointError
from adept_fx.sharing.record import from_text
from adept_fx.sharing.tensors import from_bytes
from shared_exits import CONFIG, TENSORS, quick, refused, rewrite_tensors


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
