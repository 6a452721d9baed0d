"""A decode step as one graph, the choice inside, against graphs with a check on the host between.

Llama of about 200M random parameters, bf16, half of its layers behind one exit point. One graph:
``torch.cond`` around the layers behind the exit, and, where some rows leave, sizes that only the
graph knows. Two graphs: the host reads how many rows leave and calls what is needed. Both run the
same code, with keys and values in tensors of a fixed size, so that only the choice differs.

    python examples/whole_step.py
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from adept_fx.bench.presets import build

PAST, SPACE, ROUNDS = 128, 192, 60
PACKED = 32  # rows; below, those that left are carried along
CASES = ((1, 0), (1, 1), (32, 0), (32, 16))


class Step:
    """A decode step of ``rows`` rows.

    Args:
        model: A Llama.
        rows: Batch size.
        leaving: How many rows leave at half depth.
    """

    def __init__(self, model: Any, rows: int, leaving: int) -> None:
        self.model = model.model
        self.head = model.lm_head
        config = model.config
        self.width = config.hidden_size // config.num_attention_heads
        shape = (rows, config.num_key_value_heads, SPACE, self.width)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.randn(shape, dtype=model.dtype) for _ in layers]
        self.values = [torch.randn(shape, dtype=model.dtype) for _ in layers]
        self.half = config.num_hidden_layers // 2
        self.ids = torch.arange(rows)[:, None]
        self.scores = (torch.arange(rows) < leaving).float()
        self.everyone = torch.arange(rows)

    def write(self, layer: Any, index: int, x: Tensor, turn: Any, rows: Tensor) -> None:
        """Keys and values of one new token per row."""
        attention = layer.self_attn
        keys = attention.k_proj(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
        values = attention.v_proj(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
        keys, _ = apply_rotary_pos_emb(keys, keys, *turn)
        places = self.place.expand(rows.shape)
        self.keys[index][rows, :, places] = keys[:, :, 0]
        self.values[index][rows, :, places] = values[:, :, 0]

    place = torch.tensor([PAST])

    def run(self, span: range, hidden: Tensor, turn: Any, rows: Tensor, whole: bool) -> Tensor:
        """Layers on the given rows."""
        for index in span:
            layer = self.model.layers[index]
            attention = layer.self_attn
            x = layer.input_layernorm(hidden)
            self.write(layer, index, x, turn, rows)
            query = attention.q_proj(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
            query, _ = apply_rotary_pos_emb(query, query, *turn)
            seen = (self.keys[index][:, :, : PAST + 1], self.values[index][:, :, : PAST + 1])
            keys, values = seen if whole else (item.index_select(0, rows) for item in seen)
            # One token per row: queries that share keys are packed, as transformers does in eager.
            packed = query.reshape(query.shape[0], keys.shape[1], -1, self.width)
            mixed = F.scaled_dot_product_attention(packed, keys, values)
            hidden = hidden + attention.o_proj(mixed.reshape(hidden.shape[0], 1, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden

    def first(self) -> tuple[Tensor, Any]:
        """Up to the exit."""
        hidden = self.model.embed_tokens(self.ids)
        turn = self.model.rotary_emb(hidden, self.place.expand(1, 1))
        return self.run(range(self.half), hidden, turn, self.everyone, True), turn

    def rest(self, hidden: Tensor, turn: Any, rows: Tensor, whole: bool) -> Tensor:
        """Layers behind the exit."""
        span = range(self.half, len(self.model.layers))
        return self.run(span, hidden, turn, rows, whole)

    def owed(self, hidden: Tensor, turn: Any, rows: Tensor) -> Tensor:
        """Keys and values of rows that left."""
        for index in range(self.half, len(self.model.layers)):
            layer = self.model.layers[index]
            self.write(layer, index, layer.input_layernorm(hidden), turn, rows)
        return hidden.clone()

    def last(self, hidden: Tensor) -> Tensor:
        """Norm and head."""
        logits: Tensor = self.head(self.model.norm(hidden))
        return logits


def one_graph(step: Step) -> Callable[[], Tensor]:
    """The choice is inside."""

    def some(hidden: Tensor, cos: Tensor, sin: Tensor, leaves: Tensor) -> Tensor:
        stay, gone = (~leaves).nonzero().squeeze(1), leaves.nonzero().squeeze(1)
        step.owed(hidden[gone], (cos, sin), gone)
        return hidden.index_copy(0, stay, step.rest(hidden[stay], (cos, sin), stay, False))

    def call(scores: Tensor) -> Tensor:
        hidden, turn = step.first()
        leaves = scores > 0.5
        given = (hidden, *turn, leaves)

        def everyone(hidden: Tensor, cos: Tensor, sin: Tensor, leaves: Tensor) -> Tensor:
            return step.owed(hidden, (cos, sin), step.everyone)

        def nobody(hidden: Tensor, cos: Tensor, sin: Tensor, leaves: Tensor) -> Tensor:
            return step.rest(hidden, (cos, sin), step.everyone, True)

        def not_all(hidden: Tensor, cos: Tensor, sin: Tensor, leaves: Tensor) -> Tensor:
            # A cond inside a cond may not write in place (torch 2.13: "cond_true might be modifying
            # the input!"), so that with many rows both "some" and "nobody" is the form for some.
            choice = nobody if len(step.everyone) < PACKED else some
            return choice(hidden, cos, sin, leaves)

        return step.last(torch.cond(leaves.all(), everyone, not_all, given))

    compiled = torch.compile(call, fullgraph=True)
    return lambda: compiled(step.scores)


def two_graphs(step: Step) -> Callable[[], Tensor]:
    """The host chooses."""

    def made(part: Any) -> Any:
        return torch.compile(part, dynamic=True)

    first, rest = made(step.first), made(step.rest)
    owed, last = made(step.owed), made(step.last)

    def call() -> Tensor:
        hidden, turn = first()
        leaves = step.scores > 0.5
        count = int(leaves.sum())
        if count == len(leaves):
            hidden = owed(hidden, turn, step.everyone)
        elif not count or len(leaves) < PACKED:
            hidden = rest(hidden, turn, step.everyone, True)
        else:
            stay, gone = (~leaves).nonzero().squeeze(1), leaves.nonzero().squeeze(1)
            owed(hidden[gone], turn, gone)
            hidden = hidden.index_copy(0, stay, rest(hidden[stay], turn, stay, False))
        logits: Tensor = last(hidden)
        return logits

    return call


@torch.no_grad()
def main() -> None:
    """Prints medians of interleaved runs."""
    model = build("200m", torch.bfloat16, torch.device("cpu"))
    print("rows  leaving  one graph ms  two graphs ms  one / two")
    for rows, leaving in CASES:
        torch._dynamo.reset()
        step = Step(model, rows, leaving)
        arms = {"one": one_graph(step), "two": two_graphs(step)}
        first, second = (arm().float() for arm in arms.values())
        if not torch.allclose(first, second, rtol=0.1, atol=0.1):
            raise RuntimeError("the two forms differ")
        times: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(ROUNDS):
            for name, arm in arms.items():
                began = time.perf_counter()
                arm()
                times[name].append(time.perf_counter() - began)
        one, two = (statistics.median(times[name]) * 1e3 for name in ("one", "two"))
        print(f"{rows:4}  {leaving:7}  {one:12.2f}  {two:13.2f}  {one / two:9.3f}")


if __name__ == "__main__":
    main()
