"""A gate that looks at the position alone: the later in the text, the shallower."""

from __future__ import annotations

from torch import Tensor

from adept_fx.errors import ConfigError
from adept_fx.gates.base import Gate, GateInputs


class Schedule(Gate):
    """Scores 1 where a token's position says that it may go no deeper, 0 before.

    Up to position `start` tokens go as deep as exit `deepest`, from position `end` on they leave at
    exit `shallowest`. In between the depth falls in a straight line, and a token leaves at the
    first exit that is not above it. All rows are alike: those of equal length stay together.

    Of Del Corro et al. 2023, "SkipDecode: Autoregressive Skip Decoding with Batching and Caching
    for Efficient LLM Inference", arXiv:2307.02628, which moves from a largest to a smallest number
    of layers the same way, but skips lower layers behind some that always run. It is meant for
    generation: with `prefill_threshold=1.0` a prompt runs whole.
    """

    needs = frozenset({"position"})

    def __init__(
        self,
        deepest: int | None = None,
        shallowest: int = 0,
        *,
        start: int = 0,
        end: int = 2048,
    ) -> None:
        """Makes the gate.

        Args:
            deepest: Index of an exit point, counted from 0; None, or an index past the last one:
                all layers.
            shallowest: Index of an exit point, not above `deepest`.
            start: The last position with the largest depth.
            end: The first position with the smallest depth.

        Raises:
            ConfigError: If a value is no whole number of at least 0, or depth or position would
                run the wrong way.
        """
        super().__init__()
        self.deepest = None if deepest is None else _check("deepest", deepest)
        self.shallowest = _check("shallowest", shallowest)
        self.start, self.end = _check("start", start), _check("end", end)
        if end <= start:
            raise ConfigError(f"end must be a position behind start: {end} is not above {start}")
        if deepest is not None and shallowest > deepest:
            raise ConfigError(
                f"shallowest={shallowest} is above deepest={deepest}",
                hint="both are indices of exit points; depth falls from deepest to shallowest",
            )

    def forward(self, tokens: GateInputs) -> Tensor:
        """Scores the tokens from `position`; returns float32 `[N]`."""
        deepest = tokens.num_exits if self.deepest is None else self.deepest
        fall = max(deepest - self.shallowest, 0)
        span = self.end - self.start
        gone = (tokens.need("position") - self.start).clamp(0, span)
        # exit_index >= deepest - fall * gone / span, in whole numbers.
        return ((deepest - tokens.exit_index) * span <= fall * gone).float()


def _check(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name} must be a whole number of at least 0, not {value!r}")
    return value
