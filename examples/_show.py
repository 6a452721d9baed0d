"""How the quickstart prints: coloured tokens, a histogram of exits, tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from _measure import Quality

_COLOURS = ("bright_green", "bright_cyan", "bright_yellow", "bright_magenta", "bright_red")
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def shade(depth: int, levels: Sequence[int]) -> str:
    """A background from green (the first exit) to red (all layers)."""
    index = round((len(_COLOURS) - 1) * levels.index(depth) / max(len(levels) - 1, 1))
    return f"black on {_COLOURS[index]}"


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds; a character split over tokens counts for its last one."""
    found, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False)
        if text.endswith("\ufffd") and end < len(ids):
            found.append("")
            continue
        found.append(text[len(before) :])
        before = text
    return found


def coloured(pairs: Iterable[tuple[str, int]], levels: Sequence[int], plain: bool) -> Text:
    """Text with every token in its depth's colour or, in plain output, with its depth behind it."""
    text = Text()
    for piece, depth in pairs:
        if plain:
            body = piece.rstrip("\n")
            text.append(body + str(depth).translate(_SUBSCRIPTS) + piece[len(body) :])
        else:
            text.append(piece, style=shade(depth, levels))
    return text


def print_text(
    console: Console, prompt: str, pairs: Iterable[tuple[str, int]], levels: Sequence[int]
) -> None:
    """Prints the prompt and what was generated from it: pairs of a piece of text and its depth."""
    text = coloured(pairs, levels, plain=not console.color_system)
    console.print(Text.assemble((prompt, "dim"), text, "\n"), soft_wrap=True, highlight=False)


def print_legend(console: Console, levels: Sequence[int]) -> None:
    """Says which colour stands for how many layers."""
    if not console.color_system:
        console.print("The small number behind a token: layers run to choose it.\n")
        return
    legend = Text("layers run to choose a token: ")
    for depth in levels:
        legend.append(f" {depth} ", style=shade(depth, levels)).append(" ")
    console.print(legend, end="\n\n")


def print_exits(console: Console, stats: Any, layers: int) -> None:
    """Prints where tokens left, and the work done, since the last reset of the statistics."""
    phases = stats.as_dict()
    table = Table(title="Where tokens left", title_justify="left")
    for name in ("layers", "prefill", "decode", "share"):
        table.add_column(name, justify="right")
    table.add_column("")
    rows = [
        (str(entry["exit"]), entry["prefill"]["exited"], entry["decode"]["exited"])
        for entry in stats.per_exit
    ]
    stayed = [phases[p]["total"] // layers - sum(phases[p]["exited"]) for p in phases]
    rows.append((f"all {layers}", stayed[0], stayed[1]))
    everything = max(sum(prefill + decode for _, prefill, decode in rows), 1)
    for depth, prefill, decode in rows:
        share = (prefill + decode) / everything
        bar = "█" * round(30 * share)
        table.add_row(depth, str(prefill), str(decode), f"{share:.1%}", bar)
    console.print(table)
    executed, total = stats.executed_token_layers, stats.total_token_layers
    share = executed / max(total, 1)
    console.print(f"token-layers executed: {executed} of {total} ({share:.1%})\n", highlight=False)


def print_quality(console: Console, quality: Quality) -> None:
    """Prints the agreement with the original on held-out text."""
    console.print(
        f"held-out text, {quality.tokens} tokens: {quality.agreement:.1%} of the next tokens agree "
        f"with the original's,\nneeding {quality.work:.1%} of its token-layers; loss "
        f"{quality.loss:.3f} against {quality.original_loss:.3f}\n",
        highlight=False,
        soft_wrap=True,
    )


def print_seconds(console: Console, seconds: dict[str, float], tokens: int) -> None:
    """Prints the times, each also against the first."""
    first = next(iter(seconds.values()))
    table = Table(title="Seconds, medians of interleaved runs", title_justify="left")
    for name in ("", "seconds", "tokens/s", "speed"):
        table.add_column(name, justify="right" if name else "left")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.3f}", f"{tokens / value:.1f}", f"{first / value:.2f}x")
    console.print(table)
