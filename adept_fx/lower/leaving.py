"""What happens where all tokens of a call leave at once: one compiled function does the rest."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from torch import fx

from adept_fx.graph.blocks import Stage, Synthesis
from adept_fx.lower.cache import Slots
from adept_fx.lower.forms import Forms, compiled, form_of, plain
from adept_fx.lower.layouts import DenseLayout
from adept_fx.ops import tokens as ops


class CompiledSynthesis(Forms):
    """Takes the place of a KV block's graph.

    Args:
        block: The block.
        stages: The stages that its tokens skip.
        options: Arguments of ``torch.compile``.
    """

    def __init__(self, block: Synthesis, stages: Sequence[Stage], options: dict[str, Any]) -> None:
        super().__init__(block.graph, options)
        owed = [item for stage in stages for item in stage.owed]
        slots = set(block.slots)
        self._complete = all(item.mixer is None and item.slot in slots for item in owed)
        self._block = block
        self._slots = Slots({slot: slot for slot in block.slots})
        self._settling: dict[Any, Callable[..., Any]] = {}

    def settle(self, tokens: Any, inputs: Sequence[Any]) -> bool:
        """Writes what all tokens of the call owe to the cache, if no other token and state counts.

        Nothing is gathered, and no stage is asked what it is owed: in decode at batch 1 that is
        what every exit is like.

        Args:
            tokens: The layout behind the exit point.
            inputs: As the block takes them.

        Returns:
            Whether it did.
        """
        run = tokens.run
        if not self._complete or not tokens.settles:
            return False
        layout = DenseLayout(run.place(0), self._slots.of(run.cache), run.cache, run.kept, None)
        given = [plain(item) for item in inputs]
        sources = [source.get() for source in self._block.sources]
        form = (*map(form_of, given), Slots.state(layout.slots))
        if form not in self._settling:
            self._settling[form] = compiled(_settling(self._block), self._options)
        self._settling[form](layout, *given, *sources)
        return True


def _settling(block: Synthesis) -> fx.GraphModule:
    """A graph that computes what is owed, and writes it: ``(layout, *inputs)``."""
    graph = fx.Graph()
    layout = graph.placeholder("tokens")
    found: Any = graph.graph_copy(block.graph.graph, {})
    values = iter(found if isinstance(found, (tuple, list)) else (found,))
    for slot, count in block.slots.items():
        write = ops.write_index if slot.startswith("indexer") else ops.write_cache
        graph.call_function(write, (layout, *islice(values, count), slot, ()))
    graph.output(())
    return fx.GraphModule(dict(block.graph.named_children()), graph, class_name="Settling")
