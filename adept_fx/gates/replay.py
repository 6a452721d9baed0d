"""A gate that plays back recorded scores, for tests, benchmarks and oracles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adept_fx.errors import ConfigError, GateError
from adept_fx.gates.base import Gate, GateInputs


class Replay(Gate):
    """Plays back one tensor of scores per forward call.

    The gate of the first exit runs in every forward, with `N = 0` too: there `Replay` takes its
    next tensor. Later exits of the same forward read the same tensor. So one instance must serve
    all exits: `ExitConfig(gate=Replay(scores))`. The tensors are no parameters and no buffers:
    they are in no state dict, and `.to()` leaves them, and thereby their precision, alone.
    """

    keeps_python_state = True

    def __init__(self, scores: Sequence[Tensor]) -> None:
        """Makes the gate.

        Args:
            scores: One tensor `[num_exits, B, S]` per forward call, in the order of the calls; on
                any device. Floating tensors keep their dtype, others are read as float32.

        Raises:
            ConfigError: If `scores` is no list or tuple of tensors.
        """
        super().__init__()
        if not isinstance(scores, (list, tuple)):
            raise ConfigError(
                f"scores must be a list of tensors, not {type(scores).__name__}",
                hint="one tensor [num_exits, B, S] per forward call: Replay([scores])",
            )
        for call, tensor in enumerate(scores):
            if not isinstance(tensor, Tensor):
                raise ConfigError(f"scores[{call}] must be a tensor, not {type(tensor).__name__}")
        # Detached: a tensor with a history could not be deep-copied with the model.
        self._scores: list[Tensor] = [tensor.detach() for tensor in scores]
        self._calls = 0

    def reset(self) -> None:
        """Rewinds: the next forward reads the first tensor again."""
        self._calls = 0

    def forward(self, tokens: GateInputs) -> Tensor:
        """Returns the recorded scores of the tokens, `[N]`.

        Raises:
            GateError: If there is no tensor left, if it does not fit the call, or if a later exit
                is asked before the first one.
        """
        if tokens.exit_index == 0:
            scores = self._fitting(self._calls, tokens)
            self._calls += 1  # Only now: a refused call takes nothing.
        elif self._calls == 0:
            raise GateError(
                f"Replay is asked at exit {tokens.exit_index} but never was at exit 0",
                hint="give one Replay instance to all exits and reset it between forwards only",
            )
        else:
            scores = self._fitting(self._calls - 1, tokens)
        scores = scores[tokens.exit_index].to(tokens.hidden.device)
        picked: Tensor = scores[tokens.batch_index, tokens.token_index]
        return picked if picked.is_floating_point() else picked.to(torch.float32)

    def _fitting(self, call: int, tokens: GateInputs) -> Tensor:
        """Returns the tensor of a forward call after checking that there is one and it fits."""
        if call >= len(self._scores):
            raise GateError(
                f"Replay holds scores for {len(self._scores)} forward calls; this is number "
                f"{call + 1}",
                hint="call .reset() to start over, or record one tensor per forward call",
            )
        scores, expected = self._scores[call], (tokens.num_exits, *tokens.batch_shape)
        if tuple(scores.shape) != expected:
            raise GateError(
                f"Replay holds scores of shape {tuple(scores.shape)} for forward call "
                f"{call + 1}, which has [num_exits, B, S] = {expected}",
                hint="give one tensor [num_exits, B, S] per forward call, in call order",
            )
        return scores

    def extra_repr(self) -> str:
        """Says how far the playback is."""
        return f"{self._calls} of {len(self._scores)} calls played"
