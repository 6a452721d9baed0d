"""``adept_fx.fit``."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from adept_fx.errors import ConfigError, InputError
from adept_fx.files import require_matplotlib, require_writable
from adept_fx.rewrite import restore
from adept_fx.runtime.handle import Adept
from adept_fx.training.backbone import Backbone, check_backbone, lora
from adept_fx.training.cached import States, one, write_states
from adept_fx.training.config import FitConfig
from adept_fx.training.examples import Examples, batch, examples_of, pad_token
from adept_fx.training.exits import check_quality
from adept_fx.training.guard import as_before, flags_kept, refuse_split, require_packages
from adept_fx.training.identity import identity
from adept_fx.training.result import FitResult
from adept_fx.training.trainee import Trainee, only_trainable, parts_of
from adept_fx.training.trainer import check_arguments, run


def fit(ee: Any, dataset: Iterable[Any], config: FitConfig | None = None) -> FitResult:
    """Trains gates, exit adapters and KV maps; the model itself stays as it is.

    Runs on `transformers.Trainer`, so that DDP, mixed precision, logging and checkpoints come with
    it. Gates and adapters are trained on the states of forwards in which nobody leaves, KV maps
    through forwards in which tokens leave at random. Thresholds are not changed: call
    :func:`adept_fx.calibrate` afterwards, with other data.

    Args:
        ee: A model returned by :func:`adept_fx.transform`, not compiled, in whatever mode: it is
            trained in `eval` mode, and put back.
        dataset: Text like that which the model will serve: a `datasets.Dataset` with `input_ids`
            (a classifier's: `labels`, too), or any iterable of token ids.
        config: What is trained, and how.

    Returns:
        Losses, agreement per exit point, quality and cost by step.

    Raises:
        ConfigError: The config does not fit the model.
        InputError: The dataset holds no token ids.
        UnsupportedModelError: The model's parameters are split over devices (FSDP, tensor parallel,
            ZeRO-3): a captured graph needs them whole.
    """
    config = FitConfig() if config is None else config
    _check(ee, config)
    parts = parts_of(ee, config)
    began = time.perf_counter()
    examples = _examples(ee, dataset, config)
    key = identity(ee, config)
    with as_before(ee):
        backbone = _fit_backbone(ee, examples, config, key) if config.backbone else []
        history = _fit_exits(ee, examples, config, parts, key) if parts else []
    ee.adept.calibration = None  # what was promised was promised of other exits
    seconds = time.perf_counter() - began
    exits = ee.adept.config.exit_layers
    steps = int((history or backbone)[-1]["step"])
    result = FitResult(parts, exits, steps, seconds, history, backbone)
    if config.plot is not None:
        result.plot(config.plot)
    return result


def _check(ee: Any, config: FitConfig) -> None:
    if not isinstance(config, FitConfig):
        raise ConfigError(
            f"fit takes a FitConfig, not {type(config).__name__}",
            hint="write adept_fx.FitConfig(steps=...)",
        )
    if not isinstance(getattr(ee, "adept", None), Adept):
        raise ConfigError("fit takes a rewritten model", hint="adept_fx.transform(model, config)")
    if ee.adept.compiled:
        raise ConfigError(
            "fit trains a model that is not compiled", hint="ee.adept.uncompile(), then compile()"
        )
    refuse_split(ee)
    check_arguments(config)
    check_quality(ee, config)
    require_packages(config)
    if config.backbone:
        check_backbone(ee)
    if config.plot is not None:
        require_writable(Path(config.plot))
        require_matplotlib()


def _examples(ee: Any, dataset: Iterable[Any], config: FitConfig) -> Examples:
    steps = max(config.steps, config.backbone_steps or config.steps if config.backbone else 0)
    wanted = steps * config.batch_size
    if config.mode == "cached":
        wanted = max(wanted, -(-config.cached_tokens // config.length))
    found = examples_of(dataset, wanted, config.length, classes=ee.adept.pools)
    if config.backbone and ee.adept.pools and found.labels is None:
        raise InputError(
            "a classifier's own training needs the class of every text",
            hint="give items with input_ids and labels",
        )
    return found


def _fit_exits(
    ee: Any, examples: Examples, config: FitConfig, parts: tuple[str, ...], key: dict[str, Any]
) -> list[dict[str, float]]:
    data: Any = examples
    collate: Any = partial(batch, pad=pad_token(ee))
    batch_size = config.batch_size
    if config.mode == "cached":
        folder = Path(config.cache_dir or ".")
        write_states(ee, examples, config, folder, key)
        exits = len(ee.adept.config.exit_layers)
        data = States(folder, exits, config.steps, config.tokens_per_step, config.seed)
        collate, batch_size = one, 1
    with only_trainable(ee, parts):
        return run(
            Trainee(ee, config, parts),
            data,
            collate,
            config,
            steps=config.steps,
            batch_size=batch_size,
            learning_rate=config.learning_rate,
            device=ee.device,
            place="exits",
            key=key | {"parts": list(parts)},
        )


def _fit_backbone(
    ee: Any, examples: Examples, config: FitConfig, key: dict[str, Any]
) -> list[dict[str, float]]:
    plain = restore(ee)
    _ = ee.adept.graph  # captured now: the early exits' norm is that of the model without LoRA
    with flags_kept(ee), lora(plain, ee, config) as model:
        return run(
            Backbone(model, ee, config),
            examples,
            partial(batch, pad=pad_token(ee)),
            config,
            steps=config.backbone_steps or config.steps,
            batch_size=config.batch_size,
            learning_rate=config.backbone_learning_rate,
            device=ee.device,
            place="backbone",
            key=key,
        )
