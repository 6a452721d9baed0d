"""Training with early exits: every step adds the loss of one exit depth, in turn."""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import LlamaForCausalLM

from _stdlib_lm import Settings


class Muon:
    """Momentum with orthogonalized updates, matrices of one shape at a time.

    On so few training tokens it gets much further than AdamW.
    """

    def __init__(self, matrices: Iterable[nn.Parameter]) -> None:
        self.groups: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            self.groups[matrix.shape].append(matrix)
        self.momentum = {
            shape: torch.zeros(len(group), *shape, device=group[0].device)
            for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Updates all matrices by their gradients."""
        for shape, group in self.groups.items():
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            momentum = self.momentum[shape].lerp_(gradient, 0.05)
            update = orthogonalize(gradient.lerp(momentum, 0.95))
            scale = 0.2 * max(shape) ** 0.5 * rate
            for parameter, change in zip(group, update, strict=True):
                parameter.mul_(1 - 0.05 * rate).sub_(change, alpha=scale)


def orthogonalize(matrices: Tensor, steps: int = 3) -> Tensor:
    """Moves all singular values of each matrix towards 1, by a Newton-Schulz iteration."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT).bfloat16().contiguous()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x if wide else x.mT).float()


def windows(ids: Tensor, settings: Settings) -> Iterator[Tensor]:
    """Endless shuffled batches `[batch, length + 1]`; every epoch cuts at other places."""
    order = random.Random(settings.seed)
    span = settings.length + 1
    while True:
        starts = list(range(order.randrange(settings.length), len(ids) - span, settings.length))
        order.shuffle(starts)
        for i in range(0, len(starts) - settings.batch, settings.batch):
            yield torch.stack([ids[s : s + span] for s in starts[i : i + settings.batch]])


def logits_of(
    model: LlamaForCausalLM, ids: Tensor, depths: Tensor | None, exit_layer: int
) -> tuple[Tensor, Tensor]:
    """What the model says in the end, and what each token would say after `exit_layer` layers.

    A token that leaves keeps its state; the layers behind make its keys and values of that.

    Args:
        model: The model.
        ids: `[batch, length]`.
        depths: Layers that each token runs, `[batch, length]`; None: all of them.
        exit_layer: Where the early answer is given.
    """
    decoder = model.model
    hidden = early = decoder.embed_tokens(ids)
    places = torch.arange(ids.shape[1], device=ids.device)[None]
    rotary = decoder.rotary_emb(hidden, position_ids=places)
    later = torch.full((1, 1, places.shape[1], places.shape[1]), -torch.inf, device=ids.device)
    mask = later.triu(1)
    for number, layer in enumerate(decoder.layers, start=1):
        after = layer(hidden, attention_mask=mask, position_ids=places, position_embeddings=rotary)
        stays = None if depths is None else (depths >= number)[..., None]
        hidden = after if stays is None else torch.where(stays, after, hidden)
        if number == exit_layer:
            early = hidden
    last, first = (model.lm_head(decoder.norm(state)).float() for state in (hidden, early))
    return last, first


def draw_depths(shape: torch.Size, exit_layers: Sequence[int], layers: int, share: float) -> Tensor:
    """Layers that each token runs, `[batch, length]`.

    Of the layer dropout of LayerSkip (Elhoushi et al. 2024, arXiv:2404.16710) the rate that rises
    with depth; but here single tokens leave, and stay away, as they do when exits are used. In
    every other text nobody leaves; in the others up to twice the `share`, by the text.
    """
    shares = 2 * share * torch.rand(shape[0], 1)
    shares[::2] = 0
    chosen = torch.tensor(exit_layers)[torch.randint(len(exit_layers), shape)]
    return torch.where(torch.rand(shape) < shares, chosen, layers)


def bfloat16_is_faster(device: torch.device) -> bool:
    """Measures whether this processor multiplies faster in bfloat16 than in float32."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = (torch.ones(512, 512, dtype=dtype, device=device) for _ in range(2))
        times = []
        for _ in range(8):
            start = time.perf_counter()
            (a @ b)[0, 0].item()
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) < 0.7 * seconds(torch.float32)


def schedule(done: float) -> float:
    """The share of the peak learning rate when a share `done` of the training is done."""
    return min(1.0, done / 0.04 + 0.02, (1 - done) / 0.7 + 0.02)


class Trainer:
    """Model, optimizers and data of one training."""

    def __init__(self, model: LlamaForCausalLM, ids: Tensor, settings: Settings) -> None:
        self.model, self.settings, self.device = model, settings, model.device
        layers = [p for p in model.model.layers.parameters() if p.ndim == 2]
        in_layers = {id(p) for p in layers}
        self.rest = [p for p in model.parameters() if id(p) not in in_layers]
        self.muon = Muon(layers)
        self.adam = torch.optim.AdamW(self.rest, betas=(0.9, 0.95), weight_decay=0.0)
        self.batches = windows(ids, settings)
        self.exit_layers = range(settings.first_exit, settings.layers, settings.exit_step)
        self.narrow = bfloat16_is_faster(self.device)
        self.steps, self.loss = 0, 0.0

    def losses(self, batch: Tensor, exit_layer: int, ramp: float) -> tuple[Tensor, Tensor]:
        """The loss of the last layer, and the others': of tokens which leave at an exit layer.

        They learn the next token and, by `distillation`, what the last layer says of it.
        """
        settings, ids, depths = self.settings, batch[:, :-1], None
        if settings.exit_share:
            share = settings.exit_share * ramp
            depths = draw_depths(ids.shape, self.exit_layers, settings.layers, share)
            depths = depths.to(self.device)
        last, early = logits_of(self.model, ids, depths, exit_layer)
        stays = (
            torch.ones_like(ids, dtype=torch.bool) if depths is None else depths == settings.layers
        )
        target = batch[:, 1:].masked_fill(~stays, -100).flatten()
        others = settings.exit_weight * cross_entropy(early.flatten(0, 1), target)
        if settings.distillation:
            wanted, said = last.detach()[stays].log_softmax(-1), early[stays].log_softmax(-1)
            far = kl_div(said, wanted, log_target=True, reduction="batchmean")
            others = others + settings.distillation * ramp * far
        return cross_entropy(last.flatten(0, 1), batch[:, 1:].flatten()), others

    def step(self, done: float) -> None:
        """One step when a share `done` of the training is done."""
        rate = schedule(done)
        batch = next(self.batches).to(self.device)
        exit_layer = self.exit_layers[self.steps % len(self.exit_layers)]
        ramp = min(1.0, 2 * done)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.narrow):
            last, others = self.losses(batch, exit_layer, ramp)
        (last + others).backward()
        nn.utils.clip_grad_norm_(self.rest, 1.0)
        self.adam.param_groups[0]["lr"] = self.settings.adam_rate * rate
        self.muon.step(self.settings.muon_rate * rate)
        self.adam.step()
        self.model.zero_grad()
        self.steps += 1
        self.loss += (last.item() - self.loss) * max(0.02, 1 / self.steps)


def choose_threads(step: Callable[[], None], tries: int = 3) -> None:
    """Keeps all threads, or a single one where that is faster: on a busy machine it can be."""
    everything = torch.get_num_threads()
    times: dict[int, list[float]] = {everything: [], 1: []}
    for count in (*times, *(tuple(times) * tries)):
        torch.set_num_threads(count)
        start = time.perf_counter()
        step()
        times[count].append(time.perf_counter() - start)
    torch.set_num_threads(min(times, key=lambda count: statistics.median(times[count][1:])))


def progress_bar() -> Progress:
    """A bar with the step, the loss and the time."""
    text = TextColumn(
        "[bold]training[/]  step {task.fields[step]:>4}  loss {task.fields[loss]:.3f}"
    )
    return Progress(text, BarColumn(), TaskProgressColumn(), TimeElapsedColumn())


def train(model: LlamaForCausalLM, ids: Tensor, settings: Settings) -> dict[str, float]:
    """Trains for `settings.steps` steps or `settings.seconds` seconds, whichever ends first.

    Returns:
        The loss reached (a running mean of the last layer's), steps, tokens and seconds.
    """
    threads, done, elapsed = torch.get_num_threads(), 0.0, 0.0
    trainer = Trainer(model, ids, settings)
    start = time.perf_counter()
    model.train()
    # At these lengths the gradient of the fused kernel takes longer on a CPU than all else in it.
    model.set_attn_implementation("eager" if model.device.type == "cpu" else "sdpa")
    if settings.compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    with progress_bar() as bar:
        torch.manual_seed(settings.seed)
        task = bar.add_task("", total=1.0, step=0, loss=float("nan"))
        choose_threads(lambda: trainer.step(0.0))
        while done < 1:
            trainer.step(done)
            elapsed = time.perf_counter() - start
            done = max(trainer.steps / settings.steps, elapsed / settings.seconds)
            bar.update(task, completed=min(done, 1.0), step=trainer.steps, loss=trainer.loss)
    model.eval()
    model.set_attn_implementation("sdpa")
    torch.set_num_threads(threads)
    tokens = trainer.steps * settings.batch * settings.length
    return {"loss": trainer.loss, "steps": trainer.steps, "tokens": tokens, "seconds": elapsed}
