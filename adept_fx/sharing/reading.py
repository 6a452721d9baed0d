"""``adept_fx.load``."""

import hashlib
import os
import stat
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adept_fx.config import ExitConfig
from adept_fx.errors import AdeptError, CheckpointError
from adept_fx.gates.base import Gate
from adept_fx.gates.registry import build_gates
from adept_fx.inspect_model import find_decoder, refuse
from adept_fx.model_facts import hidden_size, layer_count
from adept_fx.rewrite import transform
from adept_fx.sharing.hub import fetch
from adept_fx.sharing.names import CONFIG, TENSORS
from adept_fx.sharing.record import Record, from_text, read_config
from adept_fx.sharing.tensors import cast_gates, check_names, fill, first_names, from_bytes

_MOST_TEXT = 16 * 2**20
_MOST_TENSORS = 256 * 2**20


def load(
    model: nn.Module,
    path_or_repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: bool | str | None = None,
    strict_base: bool = True,
) -> Any:
    """Rewrites a model with exits that :func:`adept_fx.save` wrote.

    The files are data: nothing in them is run, and what does not fit is refused before anything is
    made of it. ``model`` stays as it was, as with :func:`adept_fx.transform`.

    Args:
        model: The base that the exits were made for, in any dtype, quantized, or with adapters.
        path_or_repo: A folder, or a repository ``owner/name`` on the Hub.
        revision: Of the repository.
        token: For the Hub.
        strict_base: Refuse another base: another class or vocabulary, other weights. False warns
            of it instead, and leaves the calibration out, because it promises nothing for other
            weights; the number of layers and their width must agree in any case.

    Returns:
        The rewritten model, with the thresholds and the calibration that were saved.

    Raises:
        CheckpointError: The files are missing or invalid, or made for another base.
        UnsupportedModelError: :func:`adept_fx.transform` refuses the model.
    """
    refuse(model)
    decoder = find_decoder(model)
    folder = Path(path_or_repo)
    if not folder.is_dir():
        folder = fetch(os.fspath(path_or_repo), revision, token)
    record = from_text(_read(folder / CONFIG, _MOST_TEXT))
    other = _check_base(record, model, decoder, strict_base)
    tensors = _tensors(folder / TENSORS, record, model)
    config = _config(record, decoder, tensors)
    ee = transform(model, config)
    fill(ee.adept, tensors)
    ee.adept.calibration = None if other else record.calibration
    return ee


def _read(file: Path, most: int) -> bytes:
    """A file's content, if it is a file of sensible size: a pipe would never end."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{file} is no file")
        if status.st_size > most:
            raise CheckpointError(f"{file} has {status.st_size} bytes, more than {most}")
        return file.read_bytes()
    except FileNotFoundError as error:
        hint = "adept_fx.save writes exit_config.json and exits.safetensors into one folder"
        raise CheckpointError(f"there is no {file.name} in {file.parent}", hint=hint) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error


def _check_base(record: Record, model: Any, decoder: Any, strict: bool) -> str:
    """Raises, or warns, if the model is not the base; returns what is different."""
    base = record.base
    made = f"these exits were made for {base}"
    unfit = base.unfit(model, decoder)
    if unfit:
        raise CheckpointError(f"{made}: {unfit}", hint=f"load {base}")
    other = base.difference(model, decoder)
    if other and strict:
        raise CheckpointError(
            f"{made}, and this model is not it: {other}",
            hint=f"load {base}; or strict_base=False, without any promise of a calibration",
        )
    if other:
        warnings.warn(
            f"{made}, and this model is not it ({other}): their calibration does not hold",
            stacklevel=3,
        )
    return other


def _tensors(file: Path, record: Record, model: nn.Module) -> dict[str, Tensor]:
    # Exits larger than their model make no sense.
    own = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    data = _read(file, max(own, _MOST_TENSORS))
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise CheckpointError(
            f"{file} is not the file that {CONFIG} was written with: it is damaged, or of another "
            "save",
            hint="copy or download both files again",
        )
    return from_bytes(data)


def _config(record: Record, decoder: Any, tensors: dict[str, Tensor]) -> ExitConfig:
    """The config with its gates where the model is, in the dtypes that they were saved in."""
    layers, width = layer_count(decoder), hidden_size(decoder)
    # First without memory: a file may ask for a gate of any size.
    with torch.device("meta"):
        config = _resolved(record, layers)
        try:
            planned = nn.ModuleDict({"gates": nn.ModuleList(build_gates(config, width, "meta"))})
        except AdeptError as error:
            raise CheckpointError(f"the gates in {CONFIG} do not fit: {error}") from error
    own, names = planned.state_dict(), set(first_names(planned).values())
    saved = {name: value for name, value in tensors.items() if name.startswith("gates.")}
    check_names({name: own[name] for name in names}, saved)
    _check_ranks(config, width, tensors)
    # New gates draw their parameters, which are overwritten: the caller's random numbers stay.
    with torch.random.fork_rng(devices=[]):
        config = _resolved(record, layers)
    made = nn.ModuleDict({str(at): g for at, g in enumerate(config.gates) if isinstance(g, Gate)})
    cast_gates(made, tensors, decoder.get_input_embeddings().weight.device)
    return config


def _resolved(record: Record, layers: int) -> ExitConfig:
    config = read_config(record.config)
    unset = config.prefill_threshold is None
    try:
        config = config.resolve(layers)
    except AdeptError as error:
        raise CheckpointError(f"the config in {CONFIG} does not fit: {error}") from error
    return replace(config, prefill_threshold=None) if unset else config


def _check_ranks(config: ExitConfig, width: int, tensors: dict[str, Tensor]) -> None:
    """A map of some rank has that many rows of the model's width: they must be in the file."""
    held = sum(tensor.numel() for name, tensor in tensors.items() if not name.startswith("gates."))
    ranks = {"adapter_rank": config.adapter_rank}
    if config.kv != "synthesize":
        ranks["kv_rank"] = config.kv_rank
    for name, rank in ranks.items():
        if rank * width > held:
            raise CheckpointError(f"{name} is {rank} in {CONFIG}: the tensors for it are missing")
