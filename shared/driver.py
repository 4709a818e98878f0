"""One loop on one thread that owns all state: batch from the mailbox -> machine -> commit -> effects -> acknowledge.

Every other thread (network, scheduler, child readers, signal handlers) only posts events. A machine is sans-I/O:
`handle(event, now)` returns effects, `deadline` says when it wants to be woken though nothing happens (monotonic
seconds), and a call that raises has changed nothing. The shell makes effects durable (`commit`) before it carries any
of them out (`perform`); what an effect finds out comes back as further events, handled at once. It may cut a batch into
portions, each of which is worked and acknowledged by itself.

This module must never know what a message or a round is.
"""

import collections
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from shared.errors import RemoteProtocolError
from shared.machine import Instant, Tick


def read_clock() -> Instant:
    """The only place where the daemons read the clock for their machines."""
    return Instant(time.monotonic(), time.time())


E = TypeVar("E")
F = TypeVar("F")
E_contra = TypeVar("E_contra", contravariant=True)
F_co = TypeVar("F_co", covariant=True)
F_contra = TypeVar("F_contra", contravariant=True)


class Machine(Protocol[E_contra, F_co]):
    """The pure core of a daemon."""

    @property
    def deadline(self) -> float | None:
        """Monotonic seconds at which `handle(Tick(), now)` is wanted, or None."""

    def handle(self, event: E_contra, now: Instant) -> Sequence[F_co]:
        """What to do about `event`, in order."""


class Shell(Protocol[E, F_contra]):
    """The thin outside of a daemon."""

    def portions(self, batch: Sequence[E]) -> Iterable[Sequence[E]]:
        """The batch in its order, in pieces that are each worked and settled before the next one is asked for."""

    def refused(self, event: E, error: RemoteProtocolError) -> None:
        """A peer's event was refused: count it and log one line."""

    def commit(self, effects: Sequence[F_contra]) -> None:
        """Make durable all that must be, in one transaction."""

    def perform(self, effect: F_contra) -> Iterable[E]:
        """Carry one effect out; events it yields are handled before the batch is acknowledged."""

    def settle(self, event: E) -> None:
        """`event` has been dealt with, whatever came of it: acknowledge it."""


class Mailbox(Generic[E]):
    """Where threads leave events for the owner.

    Inbound payloads spend a credit (`count` of them, `size` bytes together) and wait for one; it returns when the owner
    takes the event. All other events never wait. One payload above `size` passes when it is alone.
    """

    def __init__(self, count: int = 15, size: int = 23 << 20) -> None:
        self._count, self._size = count, size
        self._events: collections.deque[tuple[E, int | None]] = collections.deque()
        self._held, self._held_bytes = 0, 0
        self._closed = False
        self._changed = threading.Condition()

    def post(self, event: E) -> None:
        """Leave an event; never waits."""
        with self._changed:
            self._events.append((event, None))
            self._changed.notify_all()

    def post_payload(self, event: E, size: int) -> None:
        """Leave an event that carries `size` bytes from outside; waits for a credit."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._free(size))
            self._held += 1
            self._held_bytes += size
            self._events.append((event, size))
            self._changed.notify_all()

    def take(self, timeout: float | None) -> list[E]:
        """All waiting events, after at most `timeout` seconds (None: for ever); returns their credits."""
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._closed, timeout)
            taken = [event for event, _ in self._events]
            self._events.clear()
            self._held = self._held_bytes = 0
            self._changed.notify_all()
        return taken

    def close(self) -> None:
        """Let every waiting thread go; later posts still succeed and are never read."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _free(self, size: int) -> bool:
        return self._held == 0 or (self._held < self._count and self._held_bytes + size <= self._size)


class Driver(Generic[E, F]):
    """Runs one machine with its shell until `stop`."""

    def __init__(self, mailbox: Mailbox[E], machine: Machine[E | Tick, F], shell: Shell[E | Tick, F]) -> None:
        self._mailbox, self._machine, self._shell = mailbox, machine, shell
        self.stopping = False

    def stop(self) -> None:
        """Take no further batch; to be called by the owner thread."""
        self.stopping = True

    def turn(self, longest_wait: float) -> bool:
        """One batch, after at most `longest_wait` seconds (for the watchdog); whether there was anything in it."""
        due = self._machine.deadline
        wait = longest_wait if due is None else min(longest_wait, max(0.0, due - read_clock().mono))
        batch: list[E | Tick] = list(self._mailbox.take(wait))
        now = read_clock()
        due = self._machine.deadline
        if due is not None and due <= now.mono:
            batch.append(Tick())
        for portion in self._shell.portions(batch):
            self._work(portion, now)
            for event in portion:
                self._shell.settle(event)
        return bool(batch)

    def _work(self, events: Sequence[E | Tick], now: Instant) -> None:
        while events:
            effects: list[F] = []
            for event in events:
                try:
                    effects.extend(self._machine.handle(event, now))
                except RemoteProtocolError as error:
                    self._shell.refused(event, error)
            self._shell.commit(effects)
            events = [found for effect in effects for found in self._shell.perform(effect)]


def on_termination(post: Callable[[int], None]) -> None:
    """Call `post`, from a thread, with the number of every SIGTERM and SIGINT from here on."""
    # A handler in Python runs when the main thread next does something, and an owner that has just begun to wait, or
    # whose signal came to another thread, does nothing for a minute. The number on this pipe is written at once.
    numbers, written = os.pipe()
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    wanted = (signal.SIGTERM, signal.SIGINT)
    for number in wanted:
        signal.signal(number, lambda _number, _frame: None)

    def listen() -> None:
        while True:
            for number in os.read(numbers, 16):
                if number in wanted:
                    post(number)

    threading.Thread(target=listen, name="signals", daemon=True).start()
