"""Hidden states on disk: the model runs once, gates and adapters are trained on what it left."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from adept_fx.errors import ConfigError, InputError
from adept_fx.gates.base import FEATURES, GateInputs
from adept_fx.training.config import FitConfig
from adept_fx.training.examples import Examples, batch
from adept_fx.training.observe import Observation, observe

_INDEX = "states.json"
_STORED = ("hidden", *FEATURES)
# numpy knows no bfloat16: two bytes are two bytes.
_PLAIN = {torch.bfloat16: np.int16, torch.float16: np.int16, torch.float32: np.float32}


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


def write_states(ee: Any, examples: Examples, config: FitConfig, folder: Path) -> None:
    """Runs texts through the model and keeps the states; goes on where it was cut off.

    Args:
        ee: The rewritten model.
        examples: The texts.
        config: How many, and in which batches.
        folder: Where to write.

    Raises:
        ConfigError: A gate asks for what is not kept, or the folder holds states of something else.
        InputError: There are no tokens.
    """
    for gate in ee.adept.gate_list():
        missing = sorted(gate.needs - set(FEATURES))
        if missing:
            raise ConfigError(
                f"gate {type(gate).__name__} reads {', '.join(missing)}, which is not cached",
                hint='use mode="online"',
            )
    folder.mkdir(parents=True, exist_ok=True)
    key = _key(ee, examples, config)
    index = _begin(folder, key)
    step = config.batch_size
    while index["texts"] < len(examples) and index["count"] < config.cached_tokens:
        at = index["texts"]
        items = [examples[i] for i in range(at, min(at + step, len(examples)))]
        given = {name: value.to(ee.device) for name, value in batch(items).items()}
        with torch.no_grad():
            seen = observe(ee, given, tokens=config.cached_tokens - index["count"], seed=None)
        _Files(folder, index).append(seen)
        index |= {"count": index["count"] + len(seen.targets), "texts": at + len(items)}
        _note(folder, index)
    if not index["count"]:
        raise InputError("the texts have no tokens to keep the states of")


class _Files:
    """One file per kind of value, a row per token."""

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        self.kinds: dict[str, Any] = index["kinds"]
        self.count: int = index["count"]

    def append(self, seen: Observation) -> None:
        for name, value in _values(seen).items():
            dtype = str(value.dtype).removeprefix("torch.")
            self.kinds[name] = {"shape": list(value.shape[1:]), "dtype": dtype}
            plain = value.cpu().contiguous()
            plain = plain.view(torch.int16) if value.dtype.itemsize == 2 else plain
            with (self.folder / f"{name}.bin").open("r+b" if self.count else "wb") as file:
                # What a cut-off run wrote behind its last note is written again.
                file.seek(self.count * plain[:1].nbytes if len(plain) else 0)
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
        plain = np.int64 if dtype == torch.long else _PLAIN[dtype]
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


def _key(ee: Any, examples: Examples, config: FitConfig) -> dict[str, Any]:
    """What the states depend on."""
    weight = ee.get_input_embeddings().weight
    return {
        "model": type(ee).__name__,
        "weights": float(weight.detach().float().sum()),
        "exits": list(ee.adept.config.exit_layers),
        "needs": [sorted(gate.needs) for gate in ee.adept.gate_list()],
        "texts": len(examples),
        "tokens": sum(int(text.sum()) for text in examples.texts),
        "batch": config.batch_size,
        "most": config.cached_tokens,
    }


def _begin(folder: Path, key: dict[str, Any]) -> dict[str, Any]:
    file = folder / _INDEX
    if not file.exists():
        return {"key": key, "kinds": {}, "count": 0, "texts": 0}
    try:
        index: dict[str, Any] = json.loads(file.read_text("utf-8"))
        same = index["key"] == key
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise ConfigError(
            f"{folder} holds states of another model, text or configuration",
            hint="name another cache_dir, or delete this one",
        )
    return index


def _note(folder: Path, index: dict[str, Any]) -> None:
    """Whole or not at all, whenever the run is cut off."""
    new = folder / f"{_INDEX}.new"
    new.write_text(json.dumps(index), "utf-8")
    os.replace(new, folder / _INDEX)
