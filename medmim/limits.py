"""What a file from outside may cost: bounds on what is read, believed and built because of it.

Configs, indices, headers, recipes and scans come from strangers. Each bound here is far above anything honest and far
below what harms a machine, and is applied in one place, before memory or time is spent.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medmim.errors import MedmimError, SpecError

CONFIG_BYTES = 1_000_000  # of a config or an index of shards; ours have a few thousand
LIST_BYTES = 200_000_000  # of a data list, or of the index of a store: a million scans
HEADER_BYTES = 10_000_000  # of a safetensors header: a hundred bytes a tensor

ARGUMENT_DEPTH, ARGUMENT_VALUES, ARGUMENT_LENGTH = 5, 1_000, 1_000  # of the arguments of a model, and of a text in them
ARGUMENT_SIZE = 1_000_000  # of a number: no network is a million wide, deep or long

MODULES = 5_000  # of a model, see `medmim.construction`; the largest here have some hundreds
PARAMETERS = 5_000_000_000  # 20 GB in float32
BUFFERS = 300_000_000  # numbers that no file stores, such as fixed positions

VOXELS = 1_000_000_000  # of a scan: 4 GB in float32; a body of 2 m at 1 mm has half of it
UTF8 = "utf-8-sig"  # spreadsheets put a mark at the start of a file, which is no part of its text

DEFLATION = 1032  # zlib makes a file at most so many times smaller


# --- files ------------------------------------------------------------------------------------------------------------


def read_text(path: Path, limit: int) -> str:
    """The text of a file.

    Args:
        path: The file, in UTF-8.
        limit: Bytes that no honest file of its kind exceeds.

    Raises:
        SpecError: For a file that is larger, cannot be read, or is no text.
    """
    try:
        return _read(path, limit, SpecError).decode(UTF8)
    except UnicodeDecodeError:
        raise SpecError(f"{path}: not readable as text in UTF-8") from None


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns of a CSV file, and its rows by column; a cell that is missing at the end of a row is empty.

    Rows of empty cells, which spreadsheets leave behind the last one, are passed over as empty lines are.

    Raises:
        SpecError: See `read_text`.
    """
    try:
        text = _read(path, LIST_BYTES, SpecError).decode(UTF8)
        reader = csv.DictReader(io.StringIO(text, newline=""), restval="")
        return list(reader.fieldnames or ()), [row for row in reader if any(row.values())]
    except (UnicodeDecodeError, csv.Error) as failure:
        raise SpecError(f"{path}: not readable as CSV in UTF-8 ({failure}); save it as that") from None


def read_json(path: Path, limit: int, *, error: type[MedmimError] = SpecError) -> Any:
    """What a JSON file holds; see `read_text`. `error` is what is raised."""
    return parse_json(_read(path, limit, error), source=str(path), error=error)


def parse_json(text: str | bytes, *, source: str, error: type[MedmimError] = SpecError) -> Any:
    """What JSON text says; `source` names where it is from in the error."""
    try:
        return json.loads(text)
    # Bytes in another encoding and numbers of too many digits are a ValueError too.
    except (ValueError, RecursionError) as failure:
        raise error(f"{source}: not readable as JSON ({failure})") from None


def _read(path: Path, limit: int, error: type[MedmimError]) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as failure:
        raise error(f"{path}: cannot be read ({failure.strerror})") from None
    if len(content) > limit:
        raise error(f"{path}: larger than {limit} bytes, which no file of its kind is")
    return content


# --- models -----------------------------------------------------------------------------------------------------------


def plain_arguments(args: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments as they are, checked for what no network can mean.

    Raises:
        ValueError: For numbers that are not finite or too large, and for too much or too deeply nested data.
    """
    pending, values = [(args, 0)], 0
    while pending:
        value, depth = pending.pop()
        values += 1
        if depth > ARGUMENT_DEPTH or values > ARGUMENT_VALUES:
            raise ValueError(f"more than {ARGUMENT_VALUES} values, or nested more than {ARGUMENT_DEPTH} deep")
        if isinstance(value, Mapping):
            pending += ((each, depth + 1) for pair in value.items() for each in pair)
        elif isinstance(value, list | tuple):
            pending += ((each, depth + 1) for each in value)
        elif isinstance(value, str) and len(value) > ARGUMENT_LENGTH:
            raise ValueError(f"a text of more than {ARGUMENT_LENGTH} characters")
        elif isinstance(value, int | float) and not abs(value) <= ARGUMENT_SIZE:  # NaN is refused too
            raise ValueError(f"a number beyond {ARGUMENT_SIZE}")
    return args
