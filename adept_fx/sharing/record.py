"""``exit_config.json``: writing and reading it."""

import hashlib
import json
from dataclasses import dataclass, replace
from reprlib import repr as short
from typing import Any

import adept_fx
from adept_fx.config import ExitConfig
from adept_fx.errors import AdeptError, CheckpointError, ConfigError
from adept_fx.sharing.base import Base, Sampled
from adept_fx.sharing.names import CONFIG, FORMAT, is_name, without_paths

_LENGTH = 16 * 4 * 2  # hex digits of a parameter's sample
_KINDS: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "version": (str,),
    "config": (dict,),
    "calibration": (dict, type(None)),
    "base": (dict,),
    "sha256": (str,),
}
_BASE_KINDS: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "model_type": (str,),
    "layers": (int,),
    "hidden_size": (int,),
    "vocab_size": (int, type(None)),
    "name": (str, type(None)),
    "parameters": (dict,),
}


@dataclass(frozen=True)
class Record:
    """What ``exit_config.json`` says.

    Attributes:
        config: An :class:`~adept_fx.ExitConfig` as JSON text: reading it makes gates, which may
            be as large as a file says.
        calibration: That of the handle.
        base: The base that the exits were made for.
        sha256: Of the file of tensors: the two belong together.
    """

    config: str
    calibration: dict[str, Any] | None
    base: Base
    sha256: str


def current_config(adept: Any) -> ExitConfig:
    """The config with the gates and thresholds that a handle has now."""
    prefill = adept.prefill_thresholds
    if adept._one_threshold and prefill == adept.thresholds:
        prefill = None  # One number serves both phases, and will after loading.
    gates = tuple(adept.gate_list())
    config: ExitConfig = adept.config
    return replace(config, gate=gates, threshold=adept.thresholds, prefill_threshold=prefill)


def clean(calibration: object) -> dict[str, Any] | None:
    """A handle's calibration as it may be passed on: JSON types, without absolute paths.

    Raises:
        ConfigError: It is not made of JSON types.
    """
    try:
        found = json.loads(json.dumps(without_paths(calibration), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"ee.adept.calibration cannot be written to JSON: {error}") from error
    if found is not None and not isinstance(found, dict):
        raise ConfigError(f"ee.adept.calibration must be a dict or None, not {short(found)}")
    return found


def to_text(
    config: ExitConfig, calibration: dict[str, Any] | None, base: Base, tensors: bytes
) -> str:
    """The file's content.

    Raises:
        ConfigError: A gate is of no shipped class.
    """
    values = {
        "format": FORMAT,
        "version": adept_fx.__version__,
        "config": json.loads(config.to_json()),
        "calibration": calibration,
        "base": base.to_dict(),
        "sha256": hashlib.sha256(tensors).hexdigest(),
    }
    return json.dumps(values, indent=1, allow_nan=False) + "\n"


def from_text(data: bytes) -> Record:
    """Reads the file's content.

    Raises:
        CheckpointError: It is not what :func:`to_text` writes.
    """
    values = _parsed(data)
    version = values.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(
            f"{CONFIG} has format {short(version)}; this version reads up to {FORMAT}",
            hint=f"it was written by adept-fx {short(values.get('version'))}: update adept-fx",
        )
    _check_kinds(CONFIG, values, _KINDS)
    if version != FORMAT:
        raise CheckpointError(f"{CONFIG} has the unknown format {short(version)}")
    return Record(
        config=json.dumps(values["config"]),
        calibration=values["calibration"],
        base=_base(values["base"]),
        sha256=values["sha256"],
    )


def read_config(text: str) -> ExitConfig:
    """Reads a config out of a file.

    Raises:
        CheckpointError: It is none.
    """
    try:
        return ExitConfig.from_json(text)
    # Making gates, too, may fail: a size that no tensor can have is a RuntimeError of torch.
    except (AdeptError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"the config in {CONFIG} is invalid: {error}") from error


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{CONFIG} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{CONFIG} is no JSON object but {short(values)}")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_kinds(what: str, values: Any, kinds: dict[str, tuple[type, ...]]) -> None:
    if not isinstance(values, dict) or values.keys() != kinds.keys():
        found = sorted(values) if isinstance(values, dict) else values
        raise CheckpointError(f"{what} must have the keys {sorted(kinds)}, not {short(found)}")
    for key, kind in kinds.items():
        value = values[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CheckpointError(f"{key} of {what} must not be {short(value)}")


def _base(values: Any) -> Base:
    _check_kinds("base", values, _BASE_KINDS)
    kept = {name: _sampled(name, item) for name, item in values["parameters"].items()}
    for key in ("kind", "model_type"):
        # They go into messages, and nothing there should pass for something else.
        if not values[key].replace("-", "_").isidentifier() or len(values[key]) > 200:
            raise CheckpointError(f"{key} of base must not be {short(values[key])}")
    if values["name"] is not None and not is_name(values["name"]):
        raise CheckpointError(f"name of base must not be {short(values['name'])}")
    return Base(**values | {"parameters": kept})


def _sampled(name: str, item: Any) -> Sampled:
    _check_kinds(f"base.parameters[{short(name)}]", item, {"shape": (list,), "values": (str,)})
    shape, values = item["shape"], item["values"]
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in shape)
    hexadecimal = len(values) == _LENGTH and set(values) <= set("0123456789abcdef")
    if not whole or not hexadecimal:
        raise CheckpointError(f"the sample of {short(name)} in {CONFIG} is malformed")
    return Sampled(tuple(shape), values)
