"""The parts of an :class:`~adept_fx.report.explanation.Explanation`.

Sizes are counted in parameters, not in bytes. Layers are numbered from 0; exit point ``e`` lies
after ``e`` layers.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Why ``transform`` refuses a model.

    Attributes:
        step: Where it stopped: ``config``, ``model``, ``decoder``, ``gates``, ``capture``, or
            ``pass NAME``.
        error: Class of the error that it raises.
        message: What is in the way.
        hint: The way out, if there is one.
    """

    step: str
    error: str
    message: str
    hint: str | None


@dataclass(frozen=True)
class Layer:
    """One layer of the decoder.

    Attributes:
        index: Its number.
        parameters: Parameters of its modules.
        kinds: ``full_attention``, ``sliding_attention`` or ``chunked_attention``, by the mask that
            the layer reads (its own code may narrow that) or else by its cache; ``recurrent`` if a
            module keeps recurrent state. Empty if no token's result depends on another's here.
        window: Tokens that sliding or chunked attention reaches, if known.
        attention: Names of the registered functions that it hands its attention to.
        own_attention: Whether it (also) attends by itself, without such a function.
        mixer: Module with recurrent state: its path in the layer, and its class.
        key: Heads, and numbers per head, of the keys that it puts into the cache.
        value: The same of its values.
        index_key: Numbers of an index key (sparse attention), if it has such.
        reads_keys_of: Earlier layers whose keys it attends to.
    """

    index: int
    parameters: int
    kinds: tuple[str, ...] = ()
    window: int | None = None
    attention: tuple[str, ...] = ()
    own_attention: bool = False
    mixer: tuple[str, str] | None = None
    key: tuple[int, int] | None = None
    value: tuple[int, int] | None = None
    index_key: int | None = None
    reads_keys_of: tuple[int, ...] = ()


@dataclass(frozen=True)
class Stage:
    """The layers between two exit points.

    Attributes:
        first: Its first layer.
        last: Its last layer.
        parameters: Of its layers; what layers share counts once.
        kinds: How many layers there are of each kind.
    """

    first: int
    last: int
    parameters: int
    kinds: dict[str, int]


@dataclass(frozen=True)
class Gate:
    """What decides at an exit point.

    Attributes:
        name: Its name in an ``ExitConfig``, or its class.
        parameters: Its own.
        needs: What it asks for besides the hidden state (``Gate.needs``).
    """

    name: str
    parameters: int
    needs: tuple[str, ...]


@dataclass(frozen=True)
class Slot:
    """What a skipped layer is owed for each token that left.

    Attributes:
        layer: The layer.
        kind: ``key_value``, ``index_key``, or ``mixer_input`` of a module with recurrent state,
            which runs on all tokens.
        widths: Heads and numbers per head of each value: key and value; ``(1, width)`` for values
            without heads.
    """

    layer: int
    kind: str
    widths: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Projection:
    """How one kind of projection is computed for the skipped layers.

    Attributes:
        weight: Name of the weight, with ``*`` for the layer's number.
        layers: How many layers have it.
        form: ``merged``: one call, which ``compile()`` makes one batched product; ``stacked``: it
            did; ``cut``: layer by layer, only the columns that are needed; ``plain``: layer by
            layer, whole.
        computed: Output columns that are computed.
        columns: Output columns that the weight has.
        reason: Why it is not merged or not cut, if it is not.
    """

    weight: str
    layers: int
    form: str
    computed: int
    columns: int
    reason: str


@dataclass(frozen=True)
class Crossing:
    """A value that layers behind an exit point read, besides the hidden state.

    Attributes:
        name: Its name in the graph.
        shape: ``B`` rows, ``S`` new tokens and ``T`` keys of a call, numbers, or ``?`` for longer
            formulas; None if unknown.
        origin: ``call``: an input; ``prologue``: computed once, before the layers; or the layers
            that compute it, such as ``layers 0..3``.
        layout: ``tokens``: gathered with the tokens that go on; ``rows``: whole, and attention
            picks its part of it.
    """

    name: str
    shape: tuple[int | str, ...] | None
    origin: str
    layout: str


@dataclass(frozen=True)
class Exit:
    """One exit point.

    Attributes:
        after: It lies after so many layers.
        gate: What decides.
        nodes: Operations that give the skipped layers what they are owed, for all of them.
        slots: What they are owed.
        projections: How it is projected.
        crossing: What else is read behind the exit point.
        skipped_parameters: Parameters that a token which leaves here does without: those of the
            layers behind, but for the key and value projections and for modules with recurrent
            state, which run all the same.
        skipped_share: The same as a share of all the decoder's, its input embedding included (the
            head, which is as large, is outside): decoding that only reads weights saves at best
            that. Of a mixture of experts, all experts are counted.
    """

    after: int
    gate: Gate
    nodes: int
    slots: tuple[Slot, ...]
    projections: tuple[Projection, ...]
    crossing: tuple[Crossing, ...]
    skipped_parameters: int
    skipped_share: float


@dataclass(frozen=True)
class Note:
    """What costs time, or is refused, though the model is not.

    Attributes:
        kind: ``slow`` or ``refused``.
        text: What, where and why.
    """

    kind: str
    text: str
