"""transformers' Trainer, for a module whose forward is its own loss."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from adept_fx.errors import ConfigError
from adept_fx.training.config import FitConfig
from adept_fx.training.identity import read_json, write_json

_REFUSED = {
    "fsdp": "FSDP keeps parts of each parameter on every device",
    "deepspeed": "DeepSpeed may keep parts of each parameter on every device",
    "fsdp_config": "FSDP keeps parts of each parameter on every device",
    "parallelism_config": "a parallel plan keeps parts of each parameter on every device",
    "distributed_config": "a parallel plan keeps parts of each parameter on every device",
}
_OURS = {
    "learning_rate": "learning_rate, gate_learning_rate and backbone_learning_rate",
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "per_device_train_batch_size": "batch_size",
    "seed": "seed",
    "output_dir": "output_dir",
}
_HINT = "train on one device, or with DDP (torchrun), where each device has them all"


class ExitTrainer(Trainer):
    """Logs what the module kept in the meantime along with the loss."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds means since the last entry."""
        module: Any = self.accelerator.unwrap_model(self.model)
        if "loss" in logs:
            logs = logs | module.take_log()
        super().log(logs, start_time)


def check_arguments(config: FitConfig) -> None:
    """Raises for arguments of the Trainer that cannot be passed on.

    Raises:
        ConfigError: Names the argument and the reason.
    """
    for name, reason in _REFUSED.items():
        if config.trainer.get(name):
            why = f"{reason}, a captured graph needs them whole"
            raise ConfigError(f"trainer[{name!r}] is not supported: {why}", hint=_HINT)
    if config.trainer.get("gradient_checkpointing"):
        raise ConfigError(
            "trainer['gradient_checkpointing'] is not supported: exits run through a graph",
            hint="a smaller batch_size or length takes less memory",
        )
    for name in config.trainer:
        if name in _OURS:
            raise ConfigError(
                f"trainer[{name!r}] would contradict the FitConfig",
                hint=f"set {_OURS[name]} of FitConfig",
            )


def run(
    module: Any,
    dataset: Any,
    collate: Callable[[Any], Any],
    config: FitConfig,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    device: torch.device,
    place: str,
    key: dict[str, Any],
) -> list[dict[str, float]]:
    """Trains a module; returns the Trainer's log.

    Args:
        module: Its forward returns ``{"loss": ...}``.
        dataset: What batches are made of.
        collate: Makes them.
        config: Everything else.
        steps: Optimizer steps.
        batch_size: Items per step and device.
        learning_rate: Its peak.
        device: Where the model is.
        place: Folder for this training's checkpoints under ``config.output_dir``.
        key: What those are of; they are refused if it was something else.

    Raises:
        ConfigError: The Trainer refuses its arguments, or would train elsewhere.
    """
    with _folder(config, place, key) as folder:
        keeps = config.output_dir is not None
        defaults: dict[str, Any] = {
            "max_steps": steps,
            "per_device_train_batch_size": batch_size,
            "learning_rate": learning_rate,
            "warmup_steps": max(1, steps // 20),
            "lr_scheduler_type": "cosine",
            "logging_steps": max(1, steps // 20),
            "save_strategy": "steps" if keeps else "no",
            "save_steps": max(1, steps // 4),
            "save_total_limit": 2,
            "report_to": "none",
            "seed": config.seed,
            "use_cpu": device.type == "cpu",
            "dataloader_pin_memory": device.type != "cpu",
        }
        arguments = _arguments(str(folder), defaults | dict(config.trainer))
        _check_place(arguments, device)
        own = hasattr(module, "parameter_groups") and "optim" not in config.trainer
        groups = module.parameter_groups() if own else None
        decay = arguments.weight_decay
        optimizer = torch.optim.AdamW(groups, weight_decay=decay) if groups else None
        try:
            trainer = ExitTrainer(
                module, arguments, collate, train_dataset=dataset, optimizers=(optimizer, None)
            )
        except ValueError as error:
            raise ConfigError(f"transformers.Trainer refuses its arguments: {error}") from error
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ConfigError("accelerate is set to FSDP or DeepSpeed", hint=_HINT)
        trainer.model_accepts_loss_kwargs = False  # the forward takes any keyword, and means none
        find: Any = get_last_checkpoint
        trainer.train(resume_from_checkpoint=find(str(folder)) if keeps else None)
        return [dict(entry) for entry in trainer.state.log_history]


def _arguments(folder: str, chosen: dict[str, Any]) -> TrainingArguments:
    try:
        return TrainingArguments(
            output_dir=folder, remove_unused_columns=False, label_names=[], **chosen
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"transformers.TrainingArguments refuses them: {error}") from error
    except ImportError as error:
        hint = "pip install 'adept-fx[train]'"
        raise ConfigError(f"the Trainer cannot run: {error}", hint=hint) from error


def _check_place(arguments: Any, device: torch.device) -> None:
    """The Trainer moves what it trains to a device of its own choice: it must be the model's."""
    there = arguments.device
    if (there.type, there.index or 0) != (device.type, device.index or 0):
        raise ConfigError(
            f"the model is on {device}, but transformers.Trainer trains on {there}",
            hint=f"move it: ee.to({str(there)!r}); or hide other devices (CUDA_VISIBLE_DEVICES)",
        )
    # With several devices in one process it would split batches among copies of the module.
    arguments._n_gpu = min(arguments.n_gpu, 1)


@contextmanager
def _folder(config: FitConfig, place: str, key: dict[str, Any]) -> Iterator[Path]:
    if config.output_dir is None:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
        return
    folder = Path(config.output_dir) / place
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "adept_fx.json"
    if read_json(file, key, "checkpoints", "output_dir") is None:
        write_json(file, {"key": key})
    yield folder
