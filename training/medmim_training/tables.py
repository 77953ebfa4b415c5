"""Tables that people write: CSV files whose columns are known by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from medmim.errors import SpecError
from medmim.limits import read_csv


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns of a CSV file in lower case, and its rows by column, without spaces around names and cells.

    So that a column which a person wrote a little differently is not passed over.

    Raises:
        SpecError: When it is missing or cannot be read, or two columns have one name.
    """
    if not path.is_file():
        raise SpecError(f"{path}: no such file")
    written, rows = read_csv(path)
    names = {column: column.strip().lower() for column in written}
    twice = first_twice(filter(None, (names[column] for column in written)))
    if twice:
        raise SpecError(f"{path}: two columns are called {twice}; leave one")
    return list(names.values()), [{name: row[column].strip() for column, name in names.items()} for row in rows]


def read_rows(path: Path, *, needed: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file, as `read_table` has them.

    Raises:
        SpecError: Besides, when a needed column is missing, or empty somewhere.
    """
    columns, rows = read_table(path)
    missing = set(needed) - set(columns)
    if missing:
        raise SpecError(f"{path}: needs the column {', '.join(sorted(missing))}")
    for number, row in enumerate(rows, start=1):
        empty = next((column for column in needed if not row[column]), None)
        if empty:
            raise SpecError(f"{path}: row {number} has nothing in the column {empty}")
    return rows


def first_twice(names: Iterable[str]) -> str | None:
    """A name that is there more than once, if any is."""
    return next((name for name, count in Counter(names).items() if count > 1), None)
