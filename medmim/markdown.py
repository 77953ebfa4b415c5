"""Tables in Markdown, for cards and pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table, a line a row; without a line break at its end.

    Args:
        head: Names of the columns.
        rows: Cells, each becomes one line of text.
    """
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(content: object) -> str:
    """What stands in a table: one line, in which a bar ends no cell."""
    return " ".join(str(content).splitlines()).replace("|", r"\|")
