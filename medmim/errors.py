"""Errors meant for people: one sentence each, naming what is at fault and the way out.

The command line prints them without a traceback; everything else that escapes is a bug.
"""

import re

LONGEST = 5_000  # characters of a message; names in it may come from a file, and be of any length


def printable(text: str, *, keep: str = "") -> str:
    """Text from a file or a server, with everything escaped that a terminal would obey instead of show.

    Args:
        text: Any text.
        keep: Characters that stay although they are not printable, such as line ends.
    """
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


class MedmimError(Exception):
    """Base of every error that medmim raises on purpose; its message is one printable line."""

    exit_code = 1  # of a command that it ends

    def __str__(self) -> str:
        line = printable(re.sub(r"\s*\n\s*", " ", super().__str__().strip()))
        return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


class UnknownModelError(MedmimError, LookupError):
    """A model, tag or keyword that does not exist; the message names the nearest ones."""


class WeightsError(MedmimError):
    """Weights that are missing, damaged, or do not fit the model they are loaded into."""


class SpecError(MedmimError, ValueError):
    """A specification (catalog entry, config.json, recipe) that says something impossible."""


class OutputError(MedmimError):
    """A file that cannot be written where it is wanted; the message starts with its path."""


class ScanError(MedmimError, ValueError):
    """A scan that cannot be read or used; the message starts with its path."""
