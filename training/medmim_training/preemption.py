"""Being told to stop: a scheduler sends SIGTERM some time before it kills, a person presses Ctrl-C.

Both reach all processes of a group, or of a job. The one that trains saves and stops; those that read for it must not
hear of it, since it needs them until then.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from types import FrameType

from medmim.errors import MedmimError


class Preempted(MedmimError):
    """The run was told to stop and saved itself; the same command goes on with it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h, "try again later": for a scheduler to requeue


STOPS = signal.SIGTERM, signal.SIGINT


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Yields an event that SIGTERM and SIGINT set, in place of ending the process, as they do again afterwards.

    A second SIGINT is a KeyboardInterrupt as ever. Within another one, it is that one's event: whoever runs several
    things hears of it too. Outside of the main thread, where Python allows no handler, the event is never set.
    """
    before = signal.getsignal(signal.SIGTERM)
    if isinstance(before, _SetEvent):
        yield before.event
        return
    handler = _SetEvent()
    if threading.current_thread() is not threading.main_thread():
        yield handler.event
        return
    replaced = {number: signal.signal(number, handler) for number in STOPS}
    try:
        yield handler.event
    finally:
        for number, former in replaced.items():
            signal.signal(number, former)


class _SetEvent:
    """What is done at a signal: an event is set."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.event.is_set():
                raise KeyboardInterrupt
            # Not print, which may be what the signal came in between of.
            os.write(2, b"stopping after this step; once more to stop at once\n")
        self.event.set()


def start_unreachable(process: BaseProcess) -> None:
    """Starts a process that neither SIGTERM nor SIGINT reaches, not even while it starts."""
    with starting_unreachable():
        process.start()


@contextmanager
def starting_unreachable() -> Iterator[None]:
    """What starts within is reached by neither SIGTERM nor SIGINT, for its life or until it calls `be_reachable`."""
    if sys.platform == "win32":
        yield
        return
    # Starting the first process starts this one before it, and lets the signals through again (Python 3.11).
    resource_tracker.ensure_running()
    # Inherited by the processes; what arrives here meanwhile is held back, not lost.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def be_reachable() -> None:
    """Lets SIGTERM and SIGINT end this process, at once and without a word, also if they came while it started.

    What its parent ignores it ignores too, as SIGINT in the background of a script.
    """
    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
