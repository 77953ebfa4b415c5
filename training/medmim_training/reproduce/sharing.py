"""Several processes in one folder: each run is done by one of them, which holds a lock file as long as it lives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCKS, EVERYTHING = "locks", "everything"


class Claims:
    """Who does what in a folder; the system takes a lock back from a process that ended, however it ended.

    Args:
        folder: Shared by the processes; on a disk whose file locks work between the machines they are on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / LOCKS
        self.own: set[str] = set()

    @contextmanager
    def alone(self, name: str = EVERYTHING) -> Iterator[None]:
        """Waits until no other process is in a block of the same name."""
        with self._lock(name):
            yield

    @contextmanager
    def of(self, name: str) -> Iterator[bool]:
        """Claims `name` for the block; gives whether it could be had, since no other process has it."""
        lock = self._lock(name)
        with self.alone():  # nobody looks whether it is taken at this very moment
            try:
                lock.acquire(timeout=0)
            except Timeout:
                pass
            else:
                self.own.add(name)
        try:
            yield name in self.own
        finally:
            self.own.discard(name)
            lock.release()

    def taken(self, name: str) -> bool:
        """Whether some process has claimed it, this one included; to be asked within `alone`."""
        if name in self.own:
            return True
        if not self._path(name).is_file():
            return False
        try:
            with self._lock(name).acquire(timeout=0):
                return False
        except Timeout:
            return True

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.lock"

    def _lock(self, name: str) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self._path(name))
