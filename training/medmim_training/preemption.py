"""Being told to stop: a scheduler sends SIGTERM some time before it kills."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from medmim.errors import MedmimError


class Preempted(MedmimError):
    """The run was told to stop and saved itself; the same command goes on with it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h, "try again later": for a scheduler to requeue


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Yields an event that SIGTERM sets, in place of ending the process; what it did before is put back afterwards.

    Within another one, it is that one's event: whoever runs several things hears of it too. Outside of the main thread,
    where Python allows no handler, the event is never set.
    """
    before = signal.getsignal(signal.SIGTERM)
    if isinstance(before, _SetEvent):
        yield before.event
        return
    handler = _SetEvent()
    if threading.current_thread() is not threading.main_thread():
        yield handler.event
        return
    signal.signal(signal.SIGTERM, handler)
    try:
        yield handler.event
    finally:
        signal.signal(signal.SIGTERM, before)


class _SetEvent:
    """What is done at a signal: an event is set."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.event.set()
