"""What a capture records beside the graph."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from adept_fx.ops.attention import AttentionCall
from adept_fx.ops.mixer import MixerCall

FULL = "full_attention"


@dataclass
class MaskCall:
    """One recorded mask: ``function(**keywords)`` with the call's own tensors filled in.

    ``key`` is the name under which transformers passes such a mask in a dict of masks.
    ``inputs`` names the arguments that come from the call (``attention_mask``, ...).
    """

    function: Callable[..., Any]
    key: str
    keywords: dict[str, Any]
    inputs: frozenset[str]


@dataclass
class Recorder:
    """What one capture recorded, and the probes that give lengths their symbols.

    Attributes:
        slots: Per kind of cache layer, a tensor ``[R, T]`` of cached rows and key length.
        past: A tensor as long as the past.
        attentions: Recorded attention calls.
        masks: Recorded mask calls.
        mixers: Recorded calls of modules that keep recurrent state.
        recurrent: The classes of modules that are known to do so.
        embeds: How often the input embedding was called.
        output_type: Class of the decoder's output.
    """

    slots: dict[str, Tensor] = field(default_factory=dict)
    past: Tensor | None = None
    attentions: list[AttentionCall] = field(default_factory=list)
    masks: list[MaskCall] = field(default_factory=list)
    mixers: list[MixerCall] = field(default_factory=list)
    recurrent: set[type] = field(default_factory=set)
    embeds: int = 0
    output_type: type | None = None

    def slots_of(self, kind: str) -> Tensor:
        """The probe whose symbol is the key length of layers of ``kind``."""
        return self.slots.get(kind, self.slots[FULL])

    def start(self, past: Tensor, slots: dict[str, Tensor]) -> None:
        """Starts a forward anew."""
        self.past, self.slots = past, slots
        self.attentions.clear()
        self.masks.clear()
        self.mixers.clear()
        self.embeds = 0


def replace(stack: ExitStack, holder: Any, name: str, value: object) -> None:
    """Sets an attribute until the stack closes."""
    had, old = name in vars(holder), vars(holder).get(name)
    setattr(holder, name, value)
    stack.callback(lambda: setattr(holder, name, old) if had else delattr(holder, name))
