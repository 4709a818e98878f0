"""Has the kernel say when the device comes under load, so that an idle agent need not keep looking.

A trigger on /proc/pressure/<resource> (PSI; poll for POLLPRI) fires when tasks waited for more than a share of 10 s.
This thread sleeps until one does, says so, and then leaves that trigger alone for a while: pressure that stays high
costs a wake-up in half a minute, not one in each window.

    start -> (fired -> told -> resting)* -> stop

It decides nothing: what it says is "look now". Where the kernel refuses, `watching` is False, `refusal` says why, and
the owner goes on looking by the clock. Without privileges the kernel takes windows of whole 2 s since Linux 6.5.
"""

import contextlib
import errno
import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

WINDOW_US = 10_000_000
"""As long as the averages that the policy is about."""

_ALWAYS = 1_000
"""Microseconds: the kernel takes no trigger at 0."""


class PressureWatch:
    """Triggers on the pressure files; `start` and `stop` belong to the owner's thread, `fired` is called by another."""

    def __init__(
        self, proc_root: Path, limits: Mapping[str, float], fired: Callable[[], None], rest: float = 30.0
    ) -> None:
        """`limits` are percent of the time by resource (cpu, memory, io); 100 is off. `rest` is in seconds."""
        self._folder = proc_root / "pressure"
        self._limits = {resource: percent for resource, percent in limits.items() if percent < 100}
        self._fired, self._rest = fired, rest
        self._triggers: list[int] = []
        self._ending: int | None = None
        self._thread: threading.Thread | None = None
        self._refusal = "not started"

    @property
    def watching(self) -> bool:
        """Whether every pressure that the policy limits would be noticed."""
        return not self._refusal

    @property
    def refusal(self) -> str:
        """Why not; "" if so."""
        return self._refusal

    def start(self) -> None:
        """Set the triggers; all of them, or none."""
        self._refusal = ""
        try:
            for resource, percent in self._limits.items():
                self._triggers.append(_trigger(self._folder / resource, percent))
        except OSError as error:
            self._close()
            code = errno.errorcode.get(error.errno or 0, "")
            self._refusal = f"{error.filename or self._folder}: {error.strerror} ({code})"
            return
        if self._triggers:
            self._ending = os.eventfd(0, os.EFD_CLOEXEC)
            self._thread = threading.Thread(target=self._watch, args=(self._ending,), name="pressure", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it; nothing is said afterwards."""
        if self._thread is not None and self._ending is not None:
            os.eventfd_write(self._ending, 1)
            self._thread.join()
            os.close(self._ending)
        self._thread = self._ending = None
        self._close()
        self._refusal = "not started"

    def _watch(self, ending: int) -> None:
        poll = select.poll()
        poll.register(ending, select.POLLIN)
        resting = dict.fromkeys(self._triggers, 0.0)
        """Triggers that are not listened to, and until when."""
        while True:
            now = time.monotonic()
            for trigger in [each for each, until in resting.items() if until <= now]:
                poll.register(trigger, select.POLLPRI)
                del resting[trigger]
            wait = None if not resting else max(0.0, min(resting.values()) - now) * 1000 + 1
            fired = False
            for found, event in poll.poll(wait):
                if found == ending:
                    return
                poll.unregister(found)
                if event & (select.POLLERR | select.POLLNVAL):
                    self._refusal = "the kernel has withdrawn a trigger"
                else:
                    resting[found] = time.monotonic() + self._rest
                fired = True
            if fired:
                self._fired()

    def _close(self) -> None:
        for trigger in self._triggers:
            with contextlib.suppress(OSError):
                os.close(trigger)
        self._triggers = []


def _trigger(file: Path, percent: float) -> int:
    """A descriptor that polls as POLLPRI when `some` tasks waited for more than `percent` of a window; OSError."""
    found = os.open(file, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if os.fstat(found).st_size:
            # The kernel's are empty to stat; one with a size is a copy, and would just be overwritten.
            raise OSError(errno.ENOTSUP, "not a pressure file of the kernel")
        os.write(found, f"some {max(_ALWAYS, int(percent / 100 * WINDOW_US))} {WINDOW_US}\0".encode())
    except OSError as error:
        os.close(found)
        raise OSError(error.errno, error.strerror, str(file)) from None
    return found
