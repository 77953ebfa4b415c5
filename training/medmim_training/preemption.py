"""Being told to stop: a scheduler sends SIGTERM some time before it kills."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from medmim.errors import MedmimError


class Preempted(MedmimError):
    """The run was told to stop and saved itself; the same command goes on with it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h, "try again later": for a scheduler to requeue


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Yields an event that SIGTERM sets, in place of ending the process; what it did before is put back afterwards.

    Outside of the main thread, where Python allows no handler, the event is never set.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
