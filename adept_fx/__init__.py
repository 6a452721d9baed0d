"""ADEPT-FX: rewrite a Hugging Face decoder so that each token leaves when it is ready.

The root is lazy: importing it loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adept_fx import gates
    from adept_fx.calibration.calibrate import calibrate
    from adept_fx.config import ExitConfig
    from adept_fx.errors import AdeptError
    from adept_fx.report.explain import explain
    from adept_fx.rewrite import restore, transform
    from adept_fx.scanning.measure import scan
    from adept_fx.training.config import FitConfig
    from adept_fx.training.fit import fit

__version__ = "0.1.0"

__all__ = [
    "AdeptError",
    "ExitConfig",
    "FitConfig",
    "__version__",
    "calibrate",
    "explain",
    "fit",
    "gates",
    "restore",
    "scan",
    "transform",
]

_HOME = {
    "AdeptError": "adept_fx.errors",
    "ExitConfig": "adept_fx.config",
    "FitConfig": "adept_fx.training.config",
    "calibrate": "adept_fx.calibration.calibrate",
    "explain": "adept_fx.report.explain",
    "fit": "adept_fx.training.fit",
    "restore": "adept_fx.rewrite",
    "scan": "adept_fx.scanning.measure",
    "transform": "adept_fx.rewrite",
}


def __getattr__(name: str) -> Any:
    """Imports a public name from its module at first use."""
    if name == "gates":
        return importlib.import_module("adept_fx.gates")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the public names, loaded or not."""
    return sorted(globals().keys() | set(__all__))
