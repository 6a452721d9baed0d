"""A small Llama for the Python standard library: its text, its vocabulary, its cache entry."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HELD_OUT = frozenset({"argparse.py", "csv.py", "heapq.py", "queue.py", "shelve.py", "textwrap.py"})
"""Modules of the standard library that are never trained on."""

_LEFT_OUT = frozenset(
    {"encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests"}
)
_LARGEST_FILE = 200_000


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is trained; its hash names the cache entry."""

    name: ClassVar[str] = "stdlib-lm"

    layers: int = 8
    hidden: int = 128
    heads: int = 4
    mlp: int = 384
    vocabulary: int = 1024
    length: int = 128
    batch: int = 8
    steps: int = 2000
    seconds: float = 190.0
    muon_rate: float = 0.008
    adam_rate: float = 2e-2
    exit_weight: float = 1.0
    first_exit: int = 2
    exit_step: int = 1
    exit_share: float = 0.0
    distillation: float = 0.0
    compiled: bool = False
    held_out_share: float = 0.0
    seed: int = 0
    python: str = f"{sys.version_info.major}.{sys.version_info.minor}"

    def digest(self) -> str:
        """A short hash of all settings."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:12]


def stdlib_texts(held_out: bool, share: float = 0.0) -> list[str]:
    """The standard library's modules: those to train on, or those kept out of training.

    Besides `HELD_OUT`, about a `share` of all files is kept out, chosen by their names.
    """
    return [text for f, text in stdlib_files().items() if _kept_out(f, share) == held_out]


def stdlib_files() -> dict[Path, str]:
    """The text of the standard library's modules, by their path in it; some are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (f for f in root.rglob("*.py") if not _LEFT_OUT & set(f.relative_to(root).parts))
    return {
        f.relative_to(root): f.read_text("utf-8", errors="replace")
        for f in sorted(files)
        if f.stat().st_size <= _LARGEST_FILE
    }


def _kept_out(file: Path, share: float) -> bool:
    place = int(hashlib.sha256(file.as_posix().encode()).hexdigest()[:8], 16) / 2**32
    return file.as_posix() in HELD_OUT or place < share


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE vocabulary of these texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def new_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads // 2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts as one row of token ids, each text between `<s>` and `</s>`."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return torch.tensor([i for row in rows for i in (bos, *row.ids, eos)])


def cache_folder(settings: Settings) -> Path:
    """Where the model that these settings make is kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "adept-fx" / f"{settings.name}-{settings.digest()}"


def keep(folder: Path, model: Any, tokenizer: Any, figures: dict[str, float]) -> None:
    """Writes the cache entry. It appears whole or not at all, whenever the run is cut off."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as unfinished:
        whole = Path(unfinished) / folder.name
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        (whole / "figures.json").write_text(json.dumps(figures, indent=2), "utf-8")
        if not folder.exists():  # Another run may have been faster.
            whole.rename(folder)


def load_or_train(
    settings: Settings, train: Callable[[Any, Tensor, Settings], dict[str, float]]
) -> tuple[Any, Any, dict[str, float]]:
    """The trained model, its tokenizer, and the figures of its training.

    Args:
        settings: What to train.
        train: Called with the untrained model, the token ids and the settings if the cache has no
            such model; returns its figures.
    """
    folder = cache_folder(settings)
    if not folder.exists():
        texts = stdlib_texts(held_out=False, share=settings.held_out_share)
        tokenizer = train_tokenizer(texts, settings.vocabulary)
        model = new_model(settings, tokenizer)
        figures = train(model, encode(tokenizer, texts), settings)
        keep(folder, model, tokenizer, figures)
    figures = json.loads((folder / "figures.json").read_text("utf-8"))
    return (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        figures,
    )
