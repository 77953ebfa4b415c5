"""Which files have been found right, so that each is hashed once and not at every load.

A note is a small file outside of the one that it is about. It holds for the state that the file was in when it was
hashed: its size, its times, and its place on the disk. What changes a file on purpose or by accident changes those;
what a failing disk does to it goes unseen until `medmim verify`, which takes no notes.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from medmim.files import atomic_write, fault_of

WORTH_NOTING = 2**22  # bytes; less is hashed in the time that a note takes


def fault_unless_noted(path: Path, note: Path, *, sha256: str, size: int | None = None) -> str | None:
    """How a file differs from what is known of it, in words; None when it does not, or did not and is as it was.

    Args:
        path: The file.
        note: Where it is noted that it was right; a note that cannot be written is done without.
        sha256: Of the bytes that it should have.
        size: How many these are, where that is known.
    """
    if (before := _state_of(path)) == _read(note):
        return None
    fault = fault_of(path, sha256=sha256, size=size)
    if fault is None and path.stat().st_size >= WORTH_NOTING and _state_of(path) == before:
        with contextlib.suppress(OSError), atomic_write(note) as temporary:
            temporary.write_text(before, encoding="ascii")
    return fault


def note_of(path: Path, sha256: str) -> Path:
    """Where it is noted that a file of this disk has these bytes: among this user's own files.

    Beside the file a note would travel with it, and be believed of whatever a stranger put there.
    """
    from huggingface_hub import constants

    # As `huggingface_hub.cached_assets_path` has it, without the import of its client.
    folder = Path(constants.HF_ASSETS_CACHE, "medmim", "default", "verified")
    return folder / hashlib.sha256(f"{path.resolve()}\n{sha256}".encode()).hexdigest()


def _read(note: Path) -> str | None:
    try:
        return note.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None


def _state_of(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
