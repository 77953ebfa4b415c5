"""Errors meant for people: one sentence each, naming what is at fault and the way out.

The command line prints them without a traceback; everything else that escapes is a bug.
"""


class MedmimError(Exception):
    """Base of every error that medmim raises on purpose."""

    exit_code = 1  # of a command that it ends


class UnknownModelError(MedmimError, LookupError):
    """A model, tag or keyword that does not exist; the message names the nearest ones."""


class WeightsError(MedmimError):
    """Weights that are missing, damaged, or do not fit the model they are loaded into."""


class SpecError(MedmimError, ValueError):
    """A specification (catalog entry, config.json, recipe) that says something impossible."""


class ScanError(MedmimError, ValueError):
    """A scan that cannot be read or used; the message starts with its path."""
