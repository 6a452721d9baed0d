"""What one check found out."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["passed", "refused", "failed", "unavailable"]

STEPS = ("off", "exits", "generate", "restore")
"""What is checked of a model, in order.

- ``off``: threshold 1.0 equals the original, bitwise in the dense plan.
- ``exits``: mixed exits equal the masked-dense oracle (hidden states, logits, every cache layer).
- ``generate``: greedy generation at threshold 1.0 gives the original's tokens.
- ``restore``: ``restore`` gives the original back, and a checkpoint written by ``save_pretrained``
  loads into the original class with equal outputs.
"""


@dataclass(frozen=True)
class CheckResult:
    """The outcome for one model.

    Attributes:
        subject: What was checked: a ``model_type``, a path or a repository name.
        status: ``"passed"``: every step passed. ``"refused"``: ``transform`` refused it by name.
            ``"failed"``: a step failed, crashed, or ran over its limits. ``"unavailable"``: the
            original itself cannot be built or run here (a missing package, a broken default).
        reason: Why, in one line; empty if passed.
        steps: Per step that ran: ``"ok"``, or what went wrong.
        facts: What is worth telling: ``model_class``, ``decoder_class``, ``layers``, ``exits``,
            and ``layer_kinds``: the name of each kind of layer that the model has. Values are
            strings, numbers, or lists of them.
        seconds: Wall-clock time of the check.
    """

    subject: str
    status: Status
    reason: str = ""
    steps: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-compatible values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CheckResult":
        """The inverse of :meth:`to_dict`."""
        return cls(**values)
