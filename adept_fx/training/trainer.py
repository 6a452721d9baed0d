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

_REFUSED = {
    "fsdp": "FSDP keeps parts of each parameter on every device",
    "deepspeed": "DeepSpeed may keep parts of each parameter on every device",
    "fsdp_config": "FSDP keeps parts of each parameter on every device",
    "parallelism_config": "a parallel plan keeps parts of each parameter on every device",
}


class ExitTrainer(Trainer):
    """Logs what the module kept in the meantime along with the loss."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds means since the last entry."""
        module: Any = self.accelerator.unwrap_model(self.model)
        if "loss" in logs:
            logs = logs | module.take_log()
        super().log(logs, start_time)


def check_arguments(config: FitConfig) -> None:
    """Raises if the Trainer is to split parameters up.

    Raises:
        ConfigError: Names the argument and the reason.
    """
    for name, reason in _REFUSED.items():
        if config.trainer.get(name):
            raise ConfigError(
                f"trainer[{name!r}] is not supported: {reason}, a captured graph needs them whole",
                hint="train on one device, or with DDP (torchrun), where each device has them all",
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
    use_cpu: bool,
    place: str,
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
        use_cpu: The model is on the CPU, even if there is something else.
        place: Folder for this training's checkpoints under ``config.output_dir``.
    """
    with _folder(config, place) as folder:
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
            "use_cpu": use_cpu,
            "dataloader_pin_memory": not use_cpu,
        }
        chosen = defaults | dict(config.trainer)
        try:
            arguments = TrainingArguments(
                output_dir=str(folder), remove_unused_columns=False, label_names=[], **chosen
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(f"transformers.TrainingArguments refuses them: {error}") from error
        except ImportError as error:
            hint = "pip install 'adept-fx[train]'"
            raise ConfigError(f"the Trainer cannot run: {error}", hint=hint) from error
        own = hasattr(module, "parameter_groups") and "optim" not in config.trainer
        optimizer = torch.optim.AdamW(module.parameter_groups(), weight_decay=0.0) if own else None
        trainer = ExitTrainer(
            module, arguments, collate, train_dataset=dataset, optimizers=(optimizer, None)
        )
        trainer.model_accepts_loss_kwargs = False  # the forward takes any keyword, and means none
        find: Any = get_last_checkpoint
        trainer.train(resume_from_checkpoint=find(str(folder)) if keeps else None)
        return [dict(entry) for entry in trainer.state.log_history]


@contextmanager
def _folder(config: FitConfig, place: str) -> Iterator[Path]:
    if config.output_dir is not None:
        folder = Path(config.output_dir) / place
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
