"""Cuts the graph into stages and puts token compaction between them."""

import operator
from typing import Any

from torch import fx, nn
from torch.fx import Node

from adept_fx.errors import PassError, UnsupportedModelError
from adept_fx.graph import meta
from adept_fx.graph.base import Pass, PassResult, Work
from adept_fx.graph.base import Stage as Reached
from adept_fx.graph.blocks import Block, Stage, Synthesis
from adept_fx.graph.extract import Extraction, needed
from adept_fx.graph.meta import PROLOGUE
from adept_fx.graph.partition import GATE, Partition
from adept_fx.graph.stage_builder import StageBuilder
from adept_fx.graph.symbols import TokenAxes, token_axes
from adept_fx.graph.writes import slot, writes, written
from adept_fx.ops import tokens as ops


class CompactTokens(Pass):
    """Makes the exit-aware graph: stages, gates, KV synthesis, gather and scatter.

    Before: one flat masked-dense graph. After::

        cos, sin = prologue(position_ids)
        all_tokens = enter(run, inputs_embeds)
        live_0 = gather_tokens(all_tokens, inputs_embeds); cos_0 = ...
        hidden_0 = stage_0(all_tokens, live_0, mask, cos_0, sin_0)
        exit_0 = decide(all_tokens, 0, hidden_0)
        kv_0 = kv_0(exit_0, hidden_0, cos_0, sin_0)
        live_1 = gather_tokens(exit_0, hidden_0); cos_1 = ...
        hidden_1 = stage_1(exit_0, live_1, mask, cos_1, sin_1, kv_0)
        hidden = scatter_tokens((all_tokens, exit_0), (hidden_0, hidden_1))
        return epilogue(hidden)

    With exit adapters, ``adapted = adapt_exits(all_tokens, hidden)`` stands before the last line.

    Guarantees: no marker op is left; no size crosses a border between parts.

    Refuses when: a value with a batch axis but no token axis crosses an exit point.
    """

    needs = Reached.SYNTHESIZED
    reaches = Reached.COMPACTED

    def call(self, work: Work) -> PassResult:
        """Builds the outer graph and the submodules, then replaces ``work.graph``."""
        if work.stage >= Reached.COMPACTED:
            return PassResult(False, {"stages": len(work.exits) + 1})
        plan = Partition(work)
        work.graph = _Outer(work, plan).build()
        return PassResult(True, {"stages": len(work.exits) + 1, "gathers": self._gathers(work)})

    def _gathers(self, work: Work) -> int:
        return len(work.find(ops.gather_tokens))

    def ensures(self, work: Work) -> None:
        """Checks that nothing but lowered calls is left, at every depth."""
        for module in work.graph.modules():
            for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
                if getattr(node.target, "namespace", None) == "adept_fx":
                    raise PassError(f"compact_tokens left the marker {node.format_node()}")
        for node in work.graph.graph.nodes:
            if node.op == "call_function" and node.target not in _OUTER:
                raise PassError(f"compact_tokens left {node.format_node()} between the stages")


_OUTER = {
    ops.enter,
    ops.decide,
    ops.gather_tokens,
    ops.scatter_tokens,
    ops.adapt_exits,
    ops.left_at,
    operator.getitem,
}


class _Outer:
    """Builds the outer graph, part after part."""

    def __init__(self, work: Work, plan: Partition) -> None:
        self.work = work
        self.plan = plan
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.now: dict[Node, Node] = {}  # flat value -> outer value in the present layout
        self.first: dict[Node, Node] = {}  # flat value -> outer value in the layout of the call
        self.kv: list[Node] = []

    def build(self) -> fx.GraphModule:
        run = self.graph.placeholder("run")
        flat = self.work.graph.graph
        for node in flat.find_nodes(op="placeholder"):
            if meta.get(node).source is None:
                self.first[node] = self.graph.placeholder(node.name)
        self._prologue()
        embeds = next(n for n in self.first if n.name == "inputs_embeds")
        self.now = dict(self.first)
        layouts = [self._call(ops.enter, (run, self.first[embeds]), "all_tokens")]
        states = []
        hidden = self._gather(-1, layouts[0], self.first[embeds])
        for index in range(len(self.work.exits) + 1):
            outputs = self._stage(index, layouts[-1], hidden)
            states.append(outputs[0])
            if index < len(self.work.exits):
                gated = outputs[: self.plan.parts[index].gated]
                layouts.append(self._exit(index, layouts[-1], gated))
                hidden = self._gather(index, layouts[-1], outputs[0])
        arguments = (tuple(layouts), tuple(states))
        hidden = self._call(ops.scatter_tokens, arguments, "hidden")
        if self.work.adapters:
            hidden = self._call(ops.adapt_exits, (layouts[0], hidden), "adapted")
        self.graph.output(self._epilogue(hidden))
        for node in self.graph.find_nodes(op="call_function", target=ops.gather_tokens):
            if not node.users:
                self.graph.erase_node(node)  # the embeddings, where no later stage reads them
        for node in self.first.values():
            if node.op == "placeholder" and not node.users:
                self.graph.erase_node(node)  # key lengths that nothing but attention saw
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph, class_name="ExitAwareGraph")

    def _call(self, function: Any, arguments: tuple[Any, ...], name: str) -> Node:
        return self.graph.create_node("call_function", function, arguments, {}, name=name)

    def _block(self, name: str, block: nn.Module, arguments: tuple[Any, ...]) -> Node:
        self.root.add_module(name, block)
        return self.graph.create_node("call_module", name, arguments, {}, name=name)

    def _sources(self, part: Extraction) -> list[Any]:
        return [self.work.sources[node.name] for node in part.sources]

    def _items(self, node: Node, outputs: list[Node]) -> list[Node]:
        """Unpacks a part's outputs, named after what they are in the flat graph."""
        return [
            self.graph.create_node(
                "call_function", operator.getitem, (node, at), {}, name=item.name
            )
            for at, item in enumerate(outputs)
        ]

    def _prologue(self) -> None:
        """Everything that the layers read but no layer computes: positions, rotary tables."""
        wanted = {
            node: None
            for group in (
                *(part.live + part.call for part in self.plan.parts),
                *self._synthesis_inputs(),
            )
            for node in group
            if node not in self.first and meta.get(node).layer == PROLOGUE
        }
        if not wanted:
            return
        outputs = sorted(wanted, key=self.plan.order.__getitem__)
        part = Extraction(self.work.symbols)
        for node in self.first:
            part.add_input(node)
        part.copy(needed(outputs, self.first, self.plan.order, self.work.symbols))
        module = part.finish(outputs)
        _drop_unused(module, part)
        block = Block(module, self._sources(part))
        call = self._block("prologue", block, tuple(self.first[node] for node in part.inputs))
        self.first.update(zip(outputs, self._items(call, outputs), strict=True))

    def _synthesis_inputs(self) -> list[list[Node]]:
        return [
            [i for i in self._kv_call(index).args if isinstance(i, Node)]
            for index in range(len(self.work.exits))
        ]

    def _kv_call(self, index: int) -> Node:
        name = f"kv_{index}"
        found: Node = next(n for n in self.work.graph.graph.nodes if n.target == name)
        return found

    def _stage(self, index: int, tokens: Node, hidden: Node) -> list[Node]:
        plan, work = self.plan, self.work
        bounds = [0, *work.exits, work.num_layers]
        layers = range(bounds[index], bounds[index + 1])
        builder = StageBuilder(work, plan, index, len(self.kv))
        module = builder.build(layers)
        part = plan.parts[index]
        sources = self._sources(builder.part)
        stage = Stage(
            module, sources, layers, len(part.outputs), builder.owed, builder.synthesized_count
        )
        live = [self.now[node] for node in builder.live]
        call = [self.first[node] for node in part.call]
        node = self._block(f"stage_{index}", stage, (tokens, hidden, *live, *call, *self.kv))
        if len(part.outputs) == 1:
            return [node]
        items = self._items(node, part.outputs)
        self.now.update(zip(part.outputs[part.gated :], items[part.gated :], strict=True))
        return items

    def _exit(self, index: int, tokens: Node, outputs: list[Node]) -> Node:
        decision = self._call(ops.decide, (tokens, index, *outputs), f"exit_{index}")
        call = self._kv_call(index)
        flat = self.work.graph.get_submodule(f"kv_{index}")
        behind = [
            w
            for w in writes(self.work.graph.graph.nodes)
            if (meta.get(w).layer or 0) >= self.work.exits[index]
        ]
        inputs = [n for n in call.args if isinstance(n, Node) and meta.get(n).source is None]
        sources = [n for n in call.args if isinstance(n, Node) and meta.get(n).source is not None]
        axes = [token_axes(n.meta["val"], self.work.symbols) for n in inputs]
        layers = range(self.work.exits[index], self.work.num_layers)
        refs = [self.work.sources[node.name] for node in sources]
        if not isinstance(flat, fx.GraphModule):
            raise PassError(f"kv_{index} is no graph")
        block = Synthesis(flat, refs, layers, axes, {slot(w): len(written(w)) for w in behind})
        values = [outputs[0]]
        for node in inputs[1:]:
            values.append(self._left(decision) if node.target is GATE else self.now[node])
        self.kv.append(self._block(f"kv_{index}", block, (decision, *values)))
        return decision

    def _left(self, decision: Node) -> Node:
        arguments = (decision, tuple(self.work.exits))
        return self._call(ops.left_at, arguments, decision.name.replace("exit", "left"))

    def _gather(self, index: int, tokens: Node, hidden: Node) -> Node:
        """Compacts the state and everything that later stages read token by token.

        Behind the exit point ``index``, or of padding alone before the first layer (-1).
        """
        later = {n: None for part in self.plan.parts[index + 1 : -1] for n in part.live}
        kv = {n: None for inputs in self._synthesis_inputs()[index + 1 :] for n in inputs[1:]}
        for node in sorted({**later, **kv}, key=self.plan.order.__getitem__):
            axes = token_axes(node.meta["val"], self.work.symbols)
            if meta.get(node).source is not None or not axes or node not in self.now:
                continue
            _check_aligned(node, axes)
            name = f"{node.name}_{index + 1}"
            arguments = (tokens, self.now[node], tuple(axes))
            self.now[node] = self._call(ops.gather_tokens, arguments, name)
        axes = TokenAxes(batch=0, token=1)
        return self._call(ops.gather_tokens, (tokens, hidden, tuple(axes)), f"live_{index + 1}")

    def _epilogue(self, hidden: Node) -> Node:
        """The final norm, and whatever else follows the last layer."""
        work, plan = self.work, self.plan
        part = Extraction(work.symbols)
        part.add_input(plan.borders[work.num_layers], "hidden")
        last = plan.parts[-1]
        for node in last.live:
            part.add_input(node)
        part.copy(last.nodes)
        module = part.finish(last.outputs[0])
        block = Block(module, self._sources(part))
        return self._block("epilogue", block, (hidden, *(self.first[n] for n in last.live)))


def _check_aligned(node: Node, axes: TokenAxes) -> None:
    if not axes.aligned:
        raise UnsupportedModelError(
            f"{node.name} has one entry per row, not per token, and is read after an exit point",
            hint="such a value has no place in a compacted stage",
        )


def _drop_unused(module: fx.GraphModule, part: Extraction) -> None:
    """Removes inputs that the part does not read."""
    for outer in list(part.inputs):
        inner = part.copies[outer]
        if not inner.users:
            module.graph.erase_node(inner)
            part.inputs.remove(outer)
    module.recompile()
