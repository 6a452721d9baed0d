"""What Hypothesis draws for the equivalence tests, and how often."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from dialogue import Case
from product import EXITS, cache_kinds

TYPES = ("llama", "mistral", "gemma3_text", "gpt2", "bloom", "mixtral")
BF16_TYPES = ("llama", "gemma3_text", "gpt2")
EXIT_SETS: dict[str, tuple[tuple[int, ...], ...]] = {
    "llama": (EXITS, (2,), (1, 2, 3)),
    "gpt2": (EXITS, (3,)),
}

BASE = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)


def examples(count: int) -> settings:
    return settings(BASE, max_examples=count)


@st.composite
def drawn_case(draw: st.DrawFn, model_type: str, cached: bool = False) -> Case:
    lengths = draw(st.lists(st.integers(1, 24), min_size=1, max_size=4))
    extra = draw(st.sampled_from((0, 0, 2)))
    kinds = cache_kinds(model_type) + (() if cached else ("none",))
    return Case(
        lengths=tuple(lengths),
        side=draw(st.sampled_from(("left", "right"))),
        extra=extra,
        chunk=_width(max(lengths) + extra, draw(st.integers(2 if cached else 1, 4))),
        steps=draw(st.integers(1, 8)),
        cache=draw(st.sampled_from(kinds)),
        head=draw(st.booleans()),
        explicit=draw(st.booleans()),
        leave=draw(st.sampled_from((0.1, 0.4, 0.8))),
        seed=draw(st.integers(0, 1_000_000)),
    )


def _width(prompt: int, pieces: int) -> int:
    return -(-prompt // pieces)
