"""Models to check: tiny ones of a type, or the user's own."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from adept_fx.check.tiny import tiny_config

_SEED = 0


def is_model_type(subject: str) -> bool:
    """Whether ``subject`` is a type of transformers' causal-LM mapping (and no local folder)."""
    return subject in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not Path(subject).is_dir()


def build(subject: str) -> Any:
    """A model in float32 and eval mode.

    Args:
        subject: A ``model_type`` (a tiny model with random weights whose layers change the hidden
            state by its own size), or a path or repository name (loaded as it is).
    """
    auto: Any = AutoModelForCausalLM
    if not is_model_type(subject):
        return auto.from_pretrained(subject, dtype=torch.float32).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = auto.from_config(tiny_config(subject), dtype=torch.float32).eval()
    randomize(model)
    return model


@torch.no_grad()
def randomize(model: nn.Module, seed: int = _SEED) -> None:
    """Draws every parameter so that each sublayer's output has about the size of its input.

    Freshly initialized layers change the hidden state by a few percent: a layer that was skipped
    by mistake would hardly show.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() <= 1:
            parameter.add_(0.1 * noise)  # biases, and gains around what they start from
        elif id(parameter) in embeddings:
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise / _fan_in(parameter) ** 0.5)


def _fan_in(parameter: torch.Tensor) -> int:
    return min(parameter.shape[-2:]) if parameter.dim() == 3 else parameter.shape[-1]
