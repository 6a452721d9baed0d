"""Tables as text."""

import io
from collections.abc import Iterable

from rich.console import Console, RenderableType


def as_text(parts: Iterable[RenderableType]) -> str:
    """Tables and lines as a terminal of 100 columns shows them, without colours."""
    file = io.StringIO()
    console = Console(file=file, width=100, no_color=True)
    for part in parts:
        console.print(part, highlight=False)
    return file.getvalue().rstrip("\n")
