"""What :func:`adept_fx.explain` finds out about a model."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from adept_fx.report import text
from adept_fx.report.facts import Exit, Layer, Note, Refusal, Stage


@dataclass(frozen=True, repr=False)
class Explanation:
    """What ``transform`` makes of a model, or why it refuses it.

    ``str()`` and ``repr()`` give a summary, ``rich`` prints it with style, :meth:`to_dict` has it
    all.

    Attributes:
        model: Class of the model.
        decoder: Class of its decoder, if one was found.
        num_layers: Number of layers, if known.
        parameters: Number of parameters of the decoder, if one was found.
        refusal: Why the model is refused; None if it is not. Then all that follows is empty.
        container: Where the layers are: ``layers`` holds the parameters ``layers.0.*`` and so on.
        layers: The layers.
        stages: What runs between the exit points.
        exits: The exit points.
        notes: Slow paths, and calls that are refused.
        compiled: Whether the graph's parts are compiled.
    """

    model: str
    decoder: str | None = None
    num_layers: int | None = None
    parameters: int | None = None
    refusal: Refusal | None = None
    container: str = ""
    layers: tuple[Layer, ...] = ()
    stages: tuple[Stage, ...] = ()
    exits: tuple[Exit, ...] = ()
    notes: tuple[Note, ...] = ()
    compiled: bool = False

    @property
    def accepted(self) -> bool:
        """Whether ``transform`` takes the model."""
        return self.refusal is None

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types of JSON."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {"accepted": self.accepted, **found}

    def __str__(self) -> str:
        return text.plain(text.rows(self))

    __repr__ = __str__

    def __rich__(self) -> Any:
        return text.styled(text.rows(self))
