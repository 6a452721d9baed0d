"""Gates inside compiled stages."""

from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from adept_fx.gates.base import Gate


def fuses(gate: Gate) -> bool:
    """Whether a gate can be computed by the stage before it, for all tokens that the stage runs."""
    return gate.per_token and not gate.keeps_python_state and "logits" not in gate.needs


def state_of(gate: Gate) -> dict[str, Tensor]:
    """A gate's parameters and buffers by name."""
    if not gate._modules:  # most gates, at every exit point of every step
        own = {**gate._parameters, **gate._buffers}
        return {name: item for name, item in own.items() if item is not None}
    return dict(gate.named_parameters()) | dict(gate.named_buffers())


class GateRegion(nn.Module):
    """A gate as the last call of a stage's graph.

    The gate's tensors come with the call, so that equal gates behind equal stages share a graph.

    Args:
        gate: The gate. A copy without numbers is kept, and not registered: were the gate's own
            tensors in reach, compiled code would read them where it is to read those that come with
            the call, and every exit would have the scores of one exit's gate.
    """

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = [deepcopy(gate).to("meta")]
        self.needs = gate.needs

    def forward(self, layout: Any, hidden: Tensor, *features: Tensor) -> Tensor:
        """Scores of all tokens of the layout, in its order."""
        inputs = layout.inputs_of_gate(self.needs, hidden, features)
        scores: Tensor = functional_call(self.gate[0], layout.gate_state, (inputs,))
        return scores
