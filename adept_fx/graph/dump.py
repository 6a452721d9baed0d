"""Writes graphs to numbered files, to read what each pass did."""

from pathlib import Path
from typing import TYPE_CHECKING

from torch import fx

from adept_fx.graph.base import Work

if TYPE_CHECKING:
    from adept_fx.graph.runner import PassRecord


def dump(
    work: Work,
    folder: Path | None,
    number: int,
    name: str,
    record: "PassRecord | None" = None,
) -> None:
    """Writes ``NN_name.py`` with the code of the graph and of all its parts.

    Does nothing if ``folder`` is None.
    """
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"# after pass {number}: {name}; stage {work.stage.name}"]
    if record is not None:
        lines.append(
            f"# {record.seconds * 1e3:.1f} ms, modified={record.modified}, {record.counts}"
        )
    for path, module in work.graph.named_modules():
        if isinstance(module, fx.GraphModule):
            module.recompile()
            lines += ["", f"# {path or 'the graph'}", module.code.strip()]
    (folder / f"{number:02d}_{name}.py").write_text("\n".join(lines) + "\n")
