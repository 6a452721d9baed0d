"""What is measured: one kind of call, and what leaves where."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adept_fx.bench.result import Bound
from adept_fx.errors import ConfigError


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    Attributes:
        phase: ``"prefill"`` (a whole prompt) or ``"decode"`` (one token per row behind a prompt).
        batch: Rows.
        prompt: Tokens of the longest prompt.
        share: Share of the tokens that leave at ``exit``, drawn with a fixed seed; in decode, of
            the rows.
        exit: Layers that they run; 0 if nothing leaves.
        shortest: Tokens of the shortest prompt; the others lie evenly between. 0 if all are equal.
        gates: Whether the gates run: ``ee.adept.disabled()`` if not.
    """

    phase: str
    batch: int
    prompt: int
    share: float = 0.0
    exit: int = 0
    shortest: int = 0
    gates: bool = True

    def __post_init__(self) -> None:
        if self.phase not in ("prefill", "decode"):
            raise ConfigError(f"unknown phase {self.phase!r}", hint="prefill or decode")
        if not 0.0 <= self.share <= 1.0:
            raise ConfigError(f"the share of tokens that leave is {self.share}, not in 0..1")

    @property
    def name(self) -> str:
        """What the row is called."""
        lengths = f"{self.shortest}..{self.prompt}" if self.shortest else f"{self.prompt}"
        size = f"{self.batch} x {lengths}"
        if not self.gates:
            return f"{self.phase} {size}, gates off"
        if not self.share:
            return f"{self.phase} {size}, threshold 1.0"
        return f"{self.phase} {size}, {self.share:.0%} out at {self.exit}"

    def lengths(self) -> list[int]:
        """Tokens of each row's prompt."""
        if not self.shortest or self.batch == 1:
            return [self.prompt] * self.batch
        step = (self.prompt - self.shortest) / (self.batch - 1)
        return [round(self.shortest + step * row) for row in range(self.batch)]

    def mask(self) -> Tensor | None:
        """The 2-D mask of the prompt, padded on the left; None if no row is shorter."""
        if not self.shortest:
            return None
        columns = torch.arange(self.prompt)
        starts = torch.tensor([self.prompt - length for length in self.lengths()])
        return (columns >= starts[:, None]).long()

    def leaving(self) -> Tensor:
        """Which tokens of the timed call leave, ``[B, S]`` bool: a fixed share of the real ones."""
        tokens = self.prompt if self.phase == "prefill" else 1
        mask = self.mask()
        real = torch.ones(self.batch, tokens, dtype=torch.bool)
        if mask is not None and self.phase == "prefill":
            real = mask.bool()
        places = real.flatten().nonzero().squeeze(1)
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
        found = torch.zeros(real.numel(), dtype=torch.bool)
        found[places[order[: round(len(places) * self.share)]]] = True
        return found.view_as(real)


def sweep(
    phases: Sequence[str],
    batches: Sequence[int],
    prompts: Sequence[int],
    shares: Sequence[float],
    exit_layer: int,
) -> Iterator[Case]:
    """All combinations."""
    for phase in phases:
        for batch in batches:
            for prompt in prompts:
                for share in shares:
                    layer = exit_layer if share else 0
                    yield Case(phase, batch, prompt, share, layer)


def standard(exit_layer: int, device: str = "cpu") -> tuple[tuple[Case, tuple[Bound, ...]], ...]:
    """The cases that the project holds itself to, each with its bounds.

    ``"ratio"`` and ``"memory"`` must be at most the bound, ``"efficiency"`` at least.

    Args:
        exit_layer: Where tokens leave.
        device: ``"cuda"`` has cases of its own; they are meant for ``--preset 8b
            --mode reduce-overhead``.
    """
    memory = ("memory", 1.02)
    if device == "cuda":
        return (
            (Case("decode", 1, 512), (("ratio", 1.02), memory)),
            (Case("prefill", 1, 1024), (("ratio", 1.02), memory)),
            (Case("decode", 1, 512, 1.0, exit_layer), (("efficiency", 0.85),)),
        )
    return (
        (Case("prefill", 1, 512), (("ratio", 1.03), memory)),
        (Case("decode", 1, 128), (("ratio", 1.03), memory)),
        (Case("decode", 8, 128), (("ratio", 1.03), memory)),
        (Case("prefill", 1, 512, gates=False), (("ratio", 1.01), memory)),
        (Case("decode", 1, 128, gates=False), (("ratio", 1.01), memory)),
        (Case("decode", 1, 128, 1.0, exit_layer), (("efficiency", 0.90),)),
        (Case("prefill", 1, 1024, 0.5, exit_layer), (("efficiency", 0.80),)),
        (Case("prefill", 8, 256, shortest=32), (("ratio", 0.75), memory)),
        (Case("decode", 8, 128, 0.5, exit_layer), (("ratio", 1.03),)),
    )
