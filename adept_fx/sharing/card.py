"""The model card of saved exits."""

import json
import re
from pathlib import Path
from typing import Any

import transformers

from adept_fx.config import ExitConfig
from adept_fx.gates.registry import GATES
from adept_fx.sharing.base import Base
from adept_fx.sharing.names import CARD, CONFIG, TENSORS

MARK = "<!-- adept-fx rewrites this file: take this line out to keep what you change -->"
_WORDS = re.compile(r"[\w .,:;%()=+-]{1,300}", re.ASCII)
_PHASES = {"prefill": "prompts", "decode": "single tokens"}


def is_ours(folder: Path) -> bool:
    """Whether the folder's card may be written: there is none, or one that was written here."""
    file = folder / CARD
    return not file.exists() or (file.is_file() and MARK.encode() in file.read_bytes())


def card(
    config: ExitConfig,
    calibration: dict[str, Any] | None,
    base: Base,
    *,
    with_base: bool = False,
    place: str | None = None,
) -> str:
    """The card's text.

    Args:
        config: As saved.
        calibration: That of the handle.
        base: The base.
        with_base: Whether the base's checkpoint is in the same place.
        place: The repository that it will be in, if known.
    """
    parts = [
        _front(base),
        MARK,
        f"# Early exits for {base.name or base.kind}",
        _about(base, with_base),
        _loading(base, with_base, place or "FOLDER_OR_REPOSITORY"),
        "## Exits",
        _table(config),
        "A token leaves at an exit if its gate's score is above the threshold; 1.0 means never.",
        *_promise(calibration),
    ]
    return "\n\n".join(parts) + "\n"


def _front(base: Base) -> str:
    # JSON strings are YAML strings, whatever is in them.
    known = [f"base_model: {json.dumps(base.name)}"] if base.name else []
    return "\n".join(["---", "library_name: adept-fx", *known, "tags:", "- early-exit", "---"])


def _about(base: Base, with_base: bool) -> str:
    made = f"made for {base}, and for no other weights: a different base is refused."
    here = "The base is in this place, too" if with_base else "The base model is not included"
    return (
        f"`{TENSORS}` and `{CONFIG}` are early exits for ADEPT-FX (the Python package adept-fx), "
        f"{made} {here}."
    )


def _loading(base: Base, with_base: bool, place: str) -> str:
    kind = base.kind if hasattr(transformers, base.kind) else "AutoModelForCausalLM"
    source = place if with_base else base.name or "YOUR_BASE"
    return "\n".join(
        [
            "```python",
            "import adept_fx",
            f"from transformers import {kind}",
            "",
            f"model = {kind}.from_pretrained({json.dumps(source)})",
            f"ee = adept_fx.load(model, {json.dumps(place)})",
            "ee.generate(**inputs)" if "CausalLM" in kind else "ee(**inputs)",
            "```",
        ]
    )


def _table(config: ExitConfig) -> str:
    rows = zip(
        config.exit_layers, config.gates, config.thresholds, config.prefill_thresholds, strict=True
    )
    lines = ["| after layer | gate | threshold | threshold in prefill |", "|---|---|---|---|"]
    lines += [
        f"| {after} | {_gate(gate)} | {decode:.4g} | {prefill:.4g} |"
        for after, gate, decode, prefill in rows
    ]
    return "\n".join(lines)


def _gate(gate: Any) -> str:
    return next((name for name, kind in GATES.items() if type(gate) is kind), str(gate))


def _promise(calibration: dict[str, Any] | None) -> list[str]:
    """What calibration promises: numbers and plain words alone, whatever else it holds."""
    if not calibration:
        return []
    said = []
    for key, value in calibration.items():
        items = value.items() if isinstance(value, dict) else [("", value)]
        facts = ", ".join(filter(None, (_fact(name, item) for name, item in items)))
        if facts and _WORDS.fullmatch(key):
            named = f" ({_PHASES[key]})" if key in _PHASES else ""
            said.append(f"- {key.replace('_', ' ')}{named}: {facts}")
    about = (
        "The thresholds were calibrated (`adept_fx.calibrate`): on text like that which was used "
        "for it, the model with exits keeps to the original as stated here. On other text, with "
        "another base, or with other thresholds, nothing is promised."
    )
    return ["## What is promised", about, "\n".join(said)] if said else []


def _fact(name: str, value: Any) -> str:
    if name and not _WORDS.fullmatch(name):
        return ""
    words = f"{name.replace('_', ' ')} " if name else ""
    if isinstance(value, (int, float)):
        return f"{words}{value:.6g}" if not isinstance(value, bool) else f"{words}{value}"
    plain = isinstance(value, str) and _WORDS.fullmatch(value)
    return f"{words}{value}" if plain else ""
