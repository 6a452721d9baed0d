"""``adept_fx.fit``."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from adept_fx.errors import ConfigError, UnsupportedModelError
from adept_fx.files import require_matplotlib, require_writable
from adept_fx.rewrite import restore
from adept_fx.runtime.handle import Adept
from adept_fx.training.backbone import Backbone, layers_of, lora
from adept_fx.training.cached import States, one, write_states
from adept_fx.training.config import FitConfig
from adept_fx.training.examples import Examples, batch, examples_of
from adept_fx.training.exits import check_quality
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
    began, training = time.perf_counter(), ee.training
    examples = _examples(ee, dataset, config)
    ee.eval()
    try:
        backbone = _fit_backbone(ee, examples, config) if config.backbone else []
        history = _fit_exits(ee, examples, config, parts) if parts else []
    finally:
        ee.train(training)
    seconds = time.perf_counter() - began
    exits = ee.adept.config.exit_layers
    result = FitResult(parts, exits, config.steps, seconds, history, backbone)
    if config.plot is not None:
        result.plot(config.plot)
    return result


def _check(ee: Any, config: FitConfig) -> None:
    if not isinstance(getattr(ee, "adept", None), Adept):
        raise ConfigError("fit takes a rewritten model", hint="adept_fx.transform(model, config)")
    if ee.adept.compiled:
        raise ConfigError(
            "fit trains a model that is not compiled", hint="ee.adept.uncompile(), then compile()"
        )
    refuse_split(ee)
    check_arguments(config)
    check_quality(ee, config)
    if config.backbone:
        layers_of(ee)
    if config.plot is not None:
        require_writable(Path(config.plot))
        require_matplotlib()


def refuse_split(model: nn.Module) -> None:
    """Raises if parameters are split over devices.

    Raises:
        UnsupportedModelError: Names a parameter, and what splits it.
    """
    for name, module in model.named_modules():
        if type(module).__name__ in ("FullyShardedDataParallel", "FSDPModule"):
            raise _split(f"module {name or 'model'}", "FSDP")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise _split(f"parameter {name}", "FSDP or a tensor-parallel plan")
        if hasattr(parameter, "ds_id"):
            raise _split(f"parameter {name}", "DeepSpeed ZeRO-3")


def _split(what: str, by: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{what} is split over devices by {by}: a captured graph needs whole parameters",
        hint="train on one device, or with DDP (torchrun), where each device has them all",
    )


def _examples(ee: Any, dataset: Iterable[Any], config: FitConfig) -> Examples:
    steps = max(config.steps, config.backbone_steps or config.steps if config.backbone else 0)
    wanted = steps * config.batch_size
    if config.mode == "cached":
        wanted = max(wanted, -(-config.cached_tokens // config.length))
    return examples_of(dataset, wanted, config.length, classes=ee.adept.pools)


def _fit_exits(
    ee: Any, examples: Examples, config: FitConfig, parts: tuple[str, ...]
) -> list[dict[str, float]]:
    data: Any = examples
    collate: Any = batch
    batch_size = config.batch_size
    if config.mode == "cached":
        folder = Path(config.cache_dir or ".")
        write_states(ee, examples, config, folder)
        exits = len(ee.adept.config.exit_layers)
        data = States(folder, exits, config.steps, config.tokens_per_step, config.seed)
        collate, batch_size = one, 1
    with only_trainable(ee, parts):
        trainee = Trainee(ee, config, parts)
        return run(
            trainee,
            data,
            collate,
            config,
            steps=config.steps,
            batch_size=batch_size,
            learning_rate=config.learning_rate,
            use_cpu=ee.device.type == "cpu",
            place="exits",
        )


def _fit_backbone(ee: Any, examples: Examples, config: FitConfig) -> list[dict[str, float]]:
    flags = [(parameter, parameter.requires_grad) for parameter in ee.parameters()]
    try:
        with lora(restore(ee), config) as model:
            return run(
                Backbone(model, ee, config),
                examples,
                batch,
                config,
                steps=config.backbone_steps or config.steps,
                batch_size=config.batch_size,
                learning_rate=config.backbone_learning_rate,
                use_cpu=ee.device.type == "cpu",
                place="backbone",
            )
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
