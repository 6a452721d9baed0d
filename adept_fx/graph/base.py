"""What a pass is: requires, call, ensures, and a truthful account of what it did."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import IntEnum

from torch import fx
from torch.fx import Node

from adept_fx.capture import TensorRef
from adept_fx.graph.symbols import Symbols
from adept_fx.intercept import MaskCall
from adept_fx.kv.base import KVPolicy
from adept_fx.ops.attention import AttentionCall
from adept_fx.ops.mixer import MixerCall


class Stage(IntEnum):
    """How far a graph has come. Each stage has a verifier (:mod:`adept_fx.graph.verify`)."""

    CAPTURED = 0
    NORMALIZED = 1
    LAYERED = 2
    HOISTED = 3
    FOLDED = 4
    GATED = 5
    SYNTHESIZED = 6
    COMPACTED = 7


@dataclass
class Work:
    """A graph on its way through the pipeline, with the facts that belong to it.

    Attributes:
        graph: The graph; passes change it in place, the last one replaces it.
        symbols: Symbols of its shapes.
        sources: Where placeholders of the model's tensors find them.
        attentions: Recorded attention calls.
        masks: Recorded mask calls, by the name of the graph input.
        mixers: Recorded calls of modules with recurrent state.
        exits: Exit points, in layers.
        needs: What each exit's gate asks for (``Gate.needs``).
        policy: Where keys and values of skipped layers come from.
        adapters: Whether the states of tokens that left pass exit adapters at the end.
        stage: The stage reached.
        num_layers: Number of layers, once found.
        container: The path of what holds the layers in the decoder, once found.
        queries: Per layer that calls a registered attention function, where its query is found:
            the name of the region, and the query's place among its arguments.
    """

    graph: fx.GraphModule
    symbols: Symbols
    sources: dict[str, TensorRef]
    attentions: list[AttentionCall]
    masks: list[MaskCall]
    mixers: list[MixerCall]
    exits: tuple[int, ...]
    needs: tuple[frozenset[str], ...]
    policy: KVPolicy
    adapters: bool = False
    stage: Stage = Stage.CAPTURED
    num_layers: int = 0
    container: str = ""
    queries: dict[int, tuple[str, int]] = field(default_factory=dict)

    def find(self, target: object) -> list[Node]:
        """All calls of ``target``, in order."""
        return [node for node in self.graph.graph.nodes if node.target is target]


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        modified: Whether it changed anything. A second run of a pass changes nothing.
        counts: How many of what it found or made, for reports and tests.
    """

    modified: bool
    counts: dict[str, int] = field(default_factory=dict)


class Pass(ABC):
    """One rewrite of the graph.

    Subclasses name the stage that they need and the stage that they reach, and do one thing in
    :meth:`call`. The runner lints, refreshes metadata and verifies; passes do not.
    """

    needs: Stage
    reaches: Stage

    @property
    def name(self) -> str:
        """The pass's name in dumps and reports."""
        return type(self).__module__.rpartition(".")[2]

    def requires(self, work: Work) -> None:  # noqa: B027 -- optional
        """Raises what is wrong with the graph before the pass, beyond its stage."""

    @abstractmethod
    def call(self, work: Work) -> PassResult:
        """Rewrites ``work`` in place."""

    def ensures(self, work: Work) -> None:  # noqa: B027 -- optional
        """Raises :class:`~adept_fx.errors.PassError` if a guarantee of the pass does not hold."""
