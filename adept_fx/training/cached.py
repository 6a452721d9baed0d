"""Hidden states on disk: the model runs once, gates and adapters are trained on what it left."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from adept_fx.errors import InputError
from adept_fx.gates.base import FEATURES, GateInputs
from adept_fx.training.config import FitConfig
from adept_fx.training.examples import Examples, batch, pad_token
from adept_fx.training.identity import digest, read_json, write_json
from adept_fx.training.observe import Observation, observe

_INDEX = "states.json"
_STORED = ("hidden", *FEATURES)
# numpy knows no bfloat16: two bytes are two bytes.
_PLAIN = {
    torch.bfloat16: np.int16,
    torch.float16: np.int16,
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.long: np.int64,
}


class States(Dataset[Observation]):
    """Blocks of random tokens out of the states in a folder.

    Args:
        folder: Where they lie, as :func:`write_states` left them.
        exits: Number of exit points.
        blocks: Number of blocks.
        tokens: Tokens in a block.
        seed: Of the choice.
    """

    def __init__(self, folder: Path, exits: int, blocks: int, tokens: int, seed: int) -> None:
        self._files = _Files(folder, json.loads((folder / _INDEX).read_text("utf-8")))
        self._exits, self._blocks, self._tokens, self._seed = exits, blocks, tokens, seed

    def __len__(self) -> int:
        return self._blocks

    def __getitem__(self, index: int) -> Observation:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + index)
        rows = torch.randint(self._files.count, (self._tokens,), generator=generator)
        return self._files.read(rows.sort().values.numpy(), self._exits)


def one(items: Sequence[Observation]) -> dict[str, Observation]:
    """A batch is a block."""
    return {"observation": items[0]}


def write_states(
    ee: Any, examples: Examples, config: FitConfig, folder: Path, key: dict[str, Any]
) -> None:
    """Runs texts through the model and keeps the states; goes on where it was cut off.

    Of several processes the first one writes, while the others wait.

    Args:
        ee: The rewritten model.
        examples: The texts.
        config: How many, and in which batches.
        folder: Where to write.
        key: What the model is: see :func:`~adept_fx.training.identity.identity`.

    Raises:
        ConfigError: The folder holds states of something else.
        InputError: There are no tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    needs = [sorted(gate.needs & {*FEATURES}) for gate in ee.adept.gate_list()]
    key = key | {
        "dtype": str(ee.dtype),
        "needs": needs,
        "texts": digest(examples.texts),
        "classes": examples.labels,
        "batch": config.batch_size,
        "most": config.cached_tokens,
    }
    with _first(ee.device):
        _write(ee, examples, config, folder, key)


def _write(
    ee: Any, examples: Examples, config: FitConfig, folder: Path, key: dict[str, Any]
) -> None:
    new: dict[str, Any] = {"key": key, "kinds": {}, "count": 0, "texts": 0}
    index = read_json(folder / _INDEX, key, "states", "cache_dir") or new
    while index["texts"] < len(examples) and index["count"] < config.cached_tokens:
        at = index["texts"]
        items = [examples[i] for i in range(at, min(at + config.batch_size, len(examples)))]
        given = batch(items, pad_token(ee))
        given = {name: value.to(ee.device) for name, value in given.items()}
        with torch.no_grad():
            seen = observe(ee, given, tokens=config.cached_tokens - index["count"], seed=None)
        _Files(folder, index).append(seen)
        index |= {"count": index["count"] + len(seen.targets), "texts": at + len(items)}
        write_json(folder / _INDEX, index)
    if not index["count"]:
        raise InputError("the texts have no tokens to keep the states of")


@contextmanager
def _first(device: torch.device) -> Iterator[None]:
    """Lets the first of several processes go first."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    from accelerate import PartialState

    with PartialState(cpu=device.type == "cpu").main_process_first():
        yield


class _Files:
    """One file per kind of value, a row per token."""

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        self.kinds: dict[str, Any] = index["kinds"]
        self.count: int = index["count"]

    def append(self, seen: Observation) -> None:
        if not len(seen.targets):
            return
        for name, value in _values(seen).items():
            dtype = str(value.dtype).removeprefix("torch.")
            self.kinds[name] = {"shape": list(value.shape[1:]), "dtype": dtype}
            plain = value.cpu().contiguous()
            plain = plain.view(torch.int16) if value.dtype.itemsize == 2 else plain
            with (self.folder / f"{name}.bin").open("r+b" if self.count else "wb") as file:
                # What a cut-off run wrote behind its last note is written again.
                file.seek(self.count * plain[:1].nbytes)
                file.write(plain.numpy().tobytes())
                file.truncate()

    def read(self, rows: Any, exits: int) -> Observation:
        values = {name: self._rows(name, rows) for name in self.kinds}
        nothing = torch.zeros(len(rows), dtype=torch.long)
        inputs = []
        for exit_index in range(exits):
            prefix = f"exit_{exit_index}_"
            found = {name: values.get(prefix + name) for name in _STORED}
            inputs.append(
                GateInputs(
                    batch_index=nothing,
                    token_index=nothing,
                    exit_index=exit_index,
                    phase="prefill",
                    num_exits=exits,
                    batch_shape=(1, len(rows)),
                    **found,  # type: ignore[arg-type]
                )
            )
        return Observation(tuple(inputs), values["final"], values["targets"])

    def _rows(self, name: str, rows: Any) -> Tensor:
        kind = self.kinds[name]
        dtype: torch.dtype = getattr(torch, kind["dtype"])
        plain = _PLAIN[dtype]
        shape = (self.count, *kind["shape"])
        whole = np.memmap(self.folder / f"{name}.bin", plain, mode="r", shape=shape)
        return torch.from_numpy(np.ascontiguousarray(whole[rows])).view(dtype)


def _values(seen: Observation) -> dict[str, Tensor]:
    found = {"final": seen.final, "targets": seen.targets}
    for inputs in seen.inputs:
        for name in _STORED:
            value = getattr(inputs, name)
            if value is not None:
                found[f"exit_{inputs.exit_index}_{name}"] = value
    return found
