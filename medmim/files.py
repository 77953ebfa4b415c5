"""Files: written atomically, so that a reader sees the old one or the whole new one; and their digests."""

from __future__ import annotations

import csv
import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from medmim.errors import OutputError, SpecError


def to_path(value: Any, argument: str) -> Path:
    """A path that a caller gave as `argument`.

    Raises:
        SpecError: For what is none; an empty text too, which would mean the folder one happens to be in.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(path := os.fspath(value), str):
        raise SpecError(f"{argument} must be a path, a text or pathlib.Path, not {value!r}")
    if not path.strip() or "\0" in path:
        raise SpecError(f"{argument}={path!r} is no path")
    return Path(path)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced to disk and renamed to `path`.

    On an error (a full disk, an interrupt) the temporary file is removed and whatever stood at `path` stays. An
    `OSError` names `path` where it named no file, as that of a full disk, or the temporary one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept because writers such as nibabel and matplotlib choose the format by it.
    temporary = path.parent / f".writing-{uuid4().hex}{''.join(path.suffixes[-2:])}"
    # Not by tempfile, whose files are for their owner alone: this one has the permissions that the umask leaves.
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    permissions = stat.S_IMODE(os.fstat(handle).st_mode)
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(permissions)  # safetensors puts a file of its own in the place
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, temporary, str(temporary)):
            error.filename = str(path)
        raise


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Makes one error of those that a full disk or a lost one causes within, whichever library writes there.

    Args:
        path: What is written, for the error.

    Raises:
        OutputError: With the reason.
    """
    from safetensors import SafetensorError  # no OSError, although the disk is at fault

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{path}: cannot be written ({reason}); make room, or choose another output") from error


def check_writable(*paths: Path) -> None:
    """Finds out before a long computation whether files can be written, which leaves nothing behind.

    Args:
        *paths: The files; folders above them may be missing, as `atomic_write` makes those.

    Raises:
        OutputError: For the first one that cannot.
    """
    folders = set()  # that were tried
    for path in paths:
        try:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "a folder has that name")
            folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
            if folder not in folders:
                # No look at the permissions, which do not know of disks that are read-only.
                tempfile.TemporaryFile(dir=folder).close()
                folders.add(folder)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another output") from None


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file atomically, in UTF-8."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: str | Path, header: Iterable[object], rows: Iterable[Iterable[object]]) -> None:
    """Writes a CSV file atomically, in UTF-8."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


# A file to be copied or sent: where it is, or what is in it.
Content = Path | bytes


def size_of(content: Content) -> int:
    """Bytes of a file, or of what is to be one."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fault_of(path: Path, *, sha256: str, size: int | None = None) -> str | None:
    """How a file differs from what is known of it, in words; None when it does not."""
    found = path.stat().st_size
    if size is not None and found != size:
        return f"it has {found} bytes, expected {size}"
    found = sha256_of(path)
    return None if found == sha256 else f"its sha256 is {found}, expected {sha256}"
