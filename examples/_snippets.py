"""Which package of the standard library is a snippet from? The data, and a Llama that learns it."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, linear
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from _stdlib_lm import Settings, cache_folder, keep, stdlib_files, train_tokenizer
from _train import Muon, bfloat16_is_faster, choose_threads, progress_bar, schedule

_PACKAGES = 10
_FEWEST_FILES = 5
_EVERY = 4


@dataclass(frozen=True)
class SnippetSettings(Settings):
    """What is trained here: every layer gets a loss of its own (DeeBERT)."""

    name: ClassVar[str] = "classification"

    layers: int = 12
    hidden: int = 128
    heads: int = 4
    mlp: int = 384
    vocabulary: int = 2048
    length: int = 128
    batch: int = 16
    steps: int = 800
    seconds: float = 300.0
    muon_rate: float = 0.01
    adam_rate: float = 1e-2
    layer_dropout: float = 0.4
    language_weight: float = 0.3


@dataclass(frozen=True)
class Snippets:
    """Snippets `[N, length]` and the package that each is from, `[N]`."""

    ids: Tensor
    labels: Tensor

    def shuffled(self, seed: int) -> Snippets:
        """The same in another order."""
        order = torch.randperm(len(self.ids), generator=torch.Generator().manual_seed(seed))
        return Snippets(self.ids[order], self.labels[order])

    def split(self, at: int) -> tuple[Snippets, Snippets]:
        """The first ones, and the others."""
        (a, b), (c, d) = (self.ids[:at], self.ids[at:]), (self.labels[:at], self.labels[at:])
        return Snippets(a, c), Snippets(b, d)

    def items(self) -> list[dict[str, Any]]:
        """As `adept_fx.fit` and `adept_fx.calibrate` take them."""
        pairs = zip(self.ids, self.labels.tolist(), strict=True)
        return [{"input_ids": ids, "labels": label} for ids, label in pairs]


@dataclass(frozen=True)
class Data:
    """Files of ten packages, `(package, text)`: those to train on, and those that are kept out."""

    packages: tuple[str, ...]
    texts: list[tuple[int, str]]
    held_out: list[tuple[int, str]]


def load_data() -> Data:
    """The packages with most text; a hash of its path chooses every fourth file to be kept out."""
    files = {path: text for path, text in stdlib_files().items() if len(path.parts) > 1}
    counts = Counter(path.parts[0] for path in files)
    sizes: Counter[str] = Counter()
    for path, text in files.items():
        if counts[path.parts[0]] >= _FEWEST_FILES:
            sizes[path.parts[0]] += len(text)
    packages = tuple(name for name, _ in sizes.most_common(_PACKAGES))
    data = Data(packages, [], [])
    for label, package in enumerate(packages):
        own = [path for path in files if path.parts[0] == package]
        own.sort(key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())
        for number, path in enumerate(own):
            part = data.held_out if number % _EVERY == 0 else data.texts
            part.append((label, files[path]))
    return data


def cut(tokenizer: Any, texts: list[tuple[int, str]], length: int, start: int = 0) -> Snippets:
    """Whole snippets of one file each, one behind the other from token `start` on."""
    rows = tokenizer.backend_tokenizer.encode_batch([t for _, t in texts], add_special_tokens=False)
    found, labels = [], []
    for (label, _), row in zip(texts, rows, strict=True):
        for at in range(start, len(row.ids) - length + 1, length):
            found.append(row.ids[at : at + length])
            labels.append(label)
    return Snippets(torch.tensor(found), torch.tensor(labels))


def new_model(settings: SnippetSettings, tokenizer: Any, classes: int) -> Any:
    """An untrained classifier."""
    numbers: Any = {"num_labels": classes}  # which LlamaConfig's signature does not name
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads // 2,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **numbers,
    )
    torch.manual_seed(settings.seed)
    return LlamaForSequenceClassification(config)


class Trainer:
    """Trains all layers and exits together.

    The loss is that of the package behind each layer, at every token of the snippet, and that of
    the next token. Deeper layers are left out more often (LayerSkip).
    """

    def __init__(self, model: Any, batches: Iterator[Snippets], settings: SnippetSettings) -> None:
        self.model, self.settings, self.batches = model, settings, batches
        layers = [p for p in model.model.layers.parameters() if p.ndim == 2]
        in_layers = {id(p) for p in layers}
        self.rest = [p for p in model.parameters() if id(p) not in in_layers]
        self.muon = Muon(layers)
        self.adam = torch.optim.AdamW(self.rest, betas=(0.9, 0.95), weight_decay=0.0)
        self.narrow = bfloat16_is_faster(model.device)
        self.random = random.Random(settings.seed)
        self.steps, self.loss = 0, 0.0

    def losses(self, batch: Snippets) -> tuple[Tensor, Tensor]:
        """The whole model's loss in naming the package, and all else."""
        decoder, score, settings = self.model.model, self.model.score, self.settings
        hidden = decoder.embed_tokens(batch.ids)
        places = torch.arange(batch.ids.shape[1])[None]
        rotary = decoder.rotary_emb(hidden, position_ids=places)
        target = batch.labels[:, None].expand(-1, batch.ids.shape[1])[:, 8:].flatten()
        others = hidden.new_zeros(())
        for number, layer in enumerate(decoder.layers, start=1):
            if self.random.random() >= settings.layer_dropout * (number - 1) / settings.layers:
                hidden = layer(hidden, position_ids=places, position_embeddings=rotary)
            said = score(decoder.norm(hidden)[:, 8:]).float().flatten(0, 1)
            if number < settings.layers:
                others = others + cross_entropy(said, target)
        last = cross_entropy(said, target)
        hidden = decoder.norm(hidden)
        words = linear(hidden[:, :-1], decoder.embed_tokens.weight).float()
        spoken = cross_entropy(words.flatten(0, 1), batch.ids[:, 1:].flatten())
        weighted = settings.exit_weight * others / (settings.layers - 1)
        return last, weighted + settings.language_weight * spoken

    def step(self, rate: float) -> None:
        """One step at a share `rate` of the peak learning rates."""
        # For so short texts, and backwards, plain products are faster than the fused kernel.
        with sdpa_kernel(SDPBackend.MATH):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.narrow):
                last, others = self.losses(next(self.batches))
            (last + others).backward()
        for parameter in self.muon_parameters():
            if parameter.grad is None:  # a layer that was left out
                parameter.grad = torch.zeros_like(parameter)
        nn.utils.clip_grad_norm_(self.rest, 1.0)
        self.adam.param_groups[0]["lr"] = self.settings.adam_rate * rate
        self.muon.step(self.settings.muon_rate * rate)
        self.adam.step()
        self.model.zero_grad()
        self.steps += 1
        self.loss += (last.item() - self.loss) * max(0.02, 1 / self.steps)

    def muon_parameters(self) -> Iterator[nn.Parameter]:
        """The matrices of the layers."""
        for group in self.muon.groups.values():
            yield from group


def batches(
    tokenizer: Any, texts: list[tuple[int, str]], settings: SnippetSettings
) -> Iterator[Snippets]:
    """Endless shuffled batches; every epoch cuts at other places."""
    order = random.Random(settings.seed)
    while True:
        part = cut(tokenizer, texts, settings.length, start=order.randrange(settings.length))
        rows = list(range(len(part.ids)))
        order.shuffle(rows)
        for i in range(0, len(rows) - settings.batch, settings.batch):
            chosen = rows[i : i + settings.batch]
            yield Snippets(part.ids[chosen], part.labels[chosen])


def train(
    model: Any, tokenizer: Any, texts: list[tuple[int, str]], settings: SnippetSettings
) -> dict[str, float]:
    """Trains for `settings.steps` steps or `settings.seconds` seconds, whichever ends first."""
    threads, done, elapsed = torch.get_num_threads(), 0.0, 0.0
    trainer = Trainer(model, batches(tokenizer, texts, settings), settings)
    start = time.perf_counter()
    model.train()
    with progress_bar() as bar:
        task = bar.add_task("", total=1.0, step=0, loss=float("nan"))
        choose_threads(lambda: trainer.step(schedule(0.0)))
        while done < 1:
            trainer.step(schedule(done))
            elapsed = time.perf_counter() - start
            done = max(trainer.steps / settings.steps, elapsed / settings.seconds)
            bar.update(task, completed=min(done, 1.0), step=trainer.steps, loss=trainer.loss)
    model.eval()
    torch.set_num_threads(threads)
    snippets = trainer.steps * settings.batch
    return {"loss": trainer.loss, "steps": trainer.steps, "snippets": snippets, "seconds": elapsed}


def load_or_train(settings: SnippetSettings, data: Data) -> tuple[Any, Any, dict[str, float]]:
    """The trained model, its tokenizer, and the figures of its training."""
    folder: Path = cache_folder(settings)
    if not folder.exists():
        tokenizer = train_tokenizer([text for _, text in data.texts], settings.vocabulary)
        model = new_model(settings, tokenizer, len(data.packages))
        figures = train(model, tokenizer, data.texts, settings)
        keep(folder, model, tokenizer, figures)
    figures = json.loads((folder / "figures.json").read_text("utf-8"))
    model = LlamaForSequenceClassification.from_pretrained(folder)
    return model.eval(), AutoTokenizer.from_pretrained(folder), figures
