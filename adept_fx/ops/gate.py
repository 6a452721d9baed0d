"""``adept_fx::gate``: marks an exit point.

``hidden [B, S, D]`` is the state after ``e`` layers, ``features`` what the gate asked for
(``Gate.needs``), ``active`` the decision of the exit point before, if any. Returns ``[B, S]``
bool: the tokens that go on.
"""

import torch
from torch import Tensor

torch.library.define(
    "adept_fx::gate", "(Tensor hidden, Tensor[] features, Tensor? active, int exit) -> Tensor"
)


@torch.library.register_fake("adept_fx::gate")
def _(hidden: Tensor, features: list[Tensor], active: Tensor | None, exit: int) -> Tensor:
    return hidden.new_empty(hidden.shape[:2], dtype=torch.bool)
