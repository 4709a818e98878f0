"""Puts updates together from chunks that are asked for, within bounds that no sender can move. Pure.

    begin -> waiting (no room) -> collecting: chunks asked for, more when half of them are there -> whole
                                  collecting: silent -> asked again -> ... -> evicted

A chunk is taken only if it was asked for and has its exact length. Room is counted in the bytes that a head announces
before any is allocated, and memory is touched only as chunks come. Where there is no room an update waits its turn;
the least recently heard of makes way for it once it has been silent for a while. Whoever is evicted sends its head
again and begins anew.

It must never look into the bytes, and it knows nothing of rounds or heads.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from shared import chunks
from shared.errors import Reason, RemoteProtocolError
from shared.messages import MISSING_MAX

T = TypeVar("T")

_WINDOW_MIN = 4
"""Chunks of one update that are asked for at once, however many updates share `Bounds.asked`."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What all updates in parts may cost together, and those of one device. Sizes in bytes, times in seconds."""

    updates: int = 64
    size: int = 512 << 20
    device_updates: int = 2
    device_size: int = 256 << 20
    waiting: int = 1024
    """Updates that wait for room; a few KiB each."""
    asked: int = 512
    """Chunks asked for at once: they may all have to wait in the broker."""
    patience: float = 30.0
    """Silence after which an update makes way for one that waits."""
    silence: float = 60.0
    """Silence after which chunks are asked for again."""
    timeout: float = 600.0
    """Silence after which an update is given up; one that takes so long in all makes way for one that waits."""


@dataclass(slots=True)
class Step(Generic[T]):
    """What follows from one call."""

    asks: list[tuple[T, list[int]]] = field(default_factory=list)
    """Chunks to ask for, by rising number."""
    evicted: list[T] = field(default_factory=list)
    """Given up for want of room or of a sign of life; the same update may begin again."""
    dropped: list[T] = field(default_factory=list)
    """Given up because the caller wanted so."""
    whole: tuple[T, memoryview] | None = None
    """An update that is complete; its bytes are the caller's now."""


@dataclass(slots=True)
class _Update(Generic[T]):
    device: str
    name: str
    item: T
    size: int
    chunk: int
    buffer: memoryview
    left: int
    """Chunks that are not there yet."""
    next: int = 0
    """The first chunk that was never asked for."""
    asked: set[int] = field(default_factory=set)
    began: float = 0.0
    heard: float = 0.0
    """When its newest chunk came. A head is no sign of life: sending one costs nothing."""
    said: float = 0.0
    """When chunks were asked for last."""


@dataclass(slots=True)
class _Share:
    """What one device has of the room."""

    updates: int = 0
    size: int = 0
    waiting: int = 0


_NOTHING = memoryview(b"")


class Reassembler(Generic[T]):
    """All updates that come in parts. `T` is whatever the caller wants handed back with each."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._collecting: dict[tuple[str, str], _Update[T]] = {}
        self._waiting: dict[tuple[str, str], _Update[T]] = {}
        self._shares: dict[str, _Share] = {}
        self._size = 0
        self._looked = 0.0
        """When room was looked for last."""

    @property
    def collecting(self) -> int:
        """Updates that have room."""
        return len(self._collecting)

    @property
    def waiting(self) -> int:
        """Updates that have none yet."""
        return len(self._waiting)

    @property
    def size(self) -> int:
        """Bytes of room that are taken."""
        return self._size

    @property
    def deadline(self) -> float | None:
        """When `tick` is wanted, in the caller's seconds."""
        # The same sums as in `tick`: a difference is rounded otherwise, and a deadline that it missed would come again.
        bounds = self._bounds
        due = [
            min(max(each.heard, each.said) + bounds.silence, each.heard + bounds.timeout)
            for each in self._collecting.values()
        ]
        if self._waiting:
            due += [when for each in self._collecting.values() if (when := self._yields(each)) > self._looked]
        return min(due, default=None)

    def holds(self, device: str) -> bool:
        """Whether anything of this device is collected or waits."""
        return device in self._shares

    def completes(self, device: str, name: str, numbers: Collection[int]) -> bool:
        """Whether these chunks are all that an update still misses."""
        found = self._collecting.get((device, name))
        return found is not None and len(found.asked.intersection(numbers)) == found.left

    def again(self, device: str, name: str, now: float) -> Step[T] | None:
        """For an update that is here already: what it misses now. None for one that has to begin."""
        known = self._collecting.get((device, name))
        step = Step[T]()
        if known is not None:
            self._ask(known, step, now, again=True)
        return step if known is not None or (device, name) in self._waiting else None

    def begin(self, device: str, name: str, item: T, size: int, chunk: int, now: float) -> Step[T]:
        """Collect an update of `size` bytes in chunks of `chunk`. RemoteProtocolError if it never could be."""
        least, most = min(size, chunks.CHUNK_MIN), min(self._bounds.size, self._bounds.device_size)
        if chunk < least:
            raise RemoteProtocolError(Reason.BAD_CHUNK, f"chunks of {chunk} bytes, at least {least} are taken")
        if size > most:
            raise RemoteProtocolError(Reason.TOO_LARGE, f"an update of {size} bytes, at most {most} are collected")
        known = self.again(device, name, now)
        if known is not None:
            return known
        step = Step[T]()
        share = self._shares.setdefault(device, _Share())
        if len(self._waiting) >= self._bounds.waiting or share.waiting >= self._bounds.device_updates:
            self._drop_empty(device)
            step.evicted.append(item)
            return step
        share.waiting += 1
        self._waiting[device, name] = _Update(device, name, item, size, chunk, _NOTHING, chunks.count(size, chunk))
        self._look_for_room(step, now)
        return step

    def take(self, device: str, name: str, index: int, data: bytes | bytearray | memoryview, now: float) -> Step[T]:
        """A chunk came. RemoteProtocolError if it was not asked for, is here already or has not its length."""
        found = self._collecting.get((device, name))
        if found is None:
            raise RemoteProtocolError(Reason.UNASKED, f"no update {name} of {device} is being collected")
        start, end = chunks.span(found.size, found.chunk, index)
        if index not in found.asked:
            raise RemoteProtocolError(Reason.UNASKED, f"chunk {index} of {device} is here already or not asked for")
        if len(data) != end - start:
            raise RemoteProtocolError(Reason.BAD_CHUNK, f"chunk {index} has {len(data)} bytes, not {end - start}")
        found.buffer[start:end] = data
        found.asked.remove(index)
        found.left -= 1
        found.heard = now
        step = Step[T]()
        if found.left == 0:
            self._forget(found)
            step.whole = (found.item, found.buffer)
            self._look_for_room(step, now)
        elif len(found.asked) <= self._window // 2:
            self._ask(found, step, now, again=False)
        return step

    def tick(self, now: float) -> Step[T]:
        """Ask again where it has been silent; give up what has been silent for too long."""
        step = Step[T]()
        for update in list(self._collecting.values()):
            if update.heard + self._bounds.timeout <= now:
                self._evict(update, step)
            elif max(update.heard, update.said) + self._bounds.silence <= now:
                self._ask(update, step, now, again=True)
        self._look_for_room(step, now)
        return step

    def drop(self, unwanted: Callable[[T], bool], now: float) -> Step[T]:
        """Give up what is not wanted any more."""
        step = Step[T]()
        for update in [*self._collecting.values(), *self._waiting.values()]:
            if unwanted(update.item):
                self._forget(update)
                step.dropped.append(update.item)
        self._look_for_room(step, now)
        return step

    @property
    def _window(self) -> int:
        """Chunks of one update to ask for at once: fewer for each when there are many updates."""
        return max(_WINDOW_MIN, min(MISSING_MAX, self._bounds.asked // max(1, len(self._collecting))))

    def _ask(self, update: _Update[T], step: Step[T], now: float, *, again: bool) -> None:
        """Fill the window; `again`: ask for what is in it already too."""
        total = chunks.count(update.size, update.chunk)
        end = min(total, update.next + max(0, self._window - len(update.asked)))
        fresh = range(update.next, end)
        wanted = sorted(update.asked) if again else []
        update.asked.update(fresh)
        update.next, update.said = end, now
        if wanted or fresh:
            step.asks.append((update.item, [*wanted, *fresh]))

    def _yields(self, update: _Update[T]) -> float:
        """When an update makes way for one that waits."""
        return min(update.heard + self._bounds.patience, update.began + self._bounds.timeout)

    def _look_for_room(self, step: Step[T], now: float) -> None:
        """Let those begin for whom there is room, in the order in which they came."""
        self._looked = now
        for update in list(self._waiting.values()):
            while (lack := self._lack(update)) is not None:
                pool = [each for each in self._collecting.values() if lack == "total" or each.device == update.device]
                silent = [each for each in pool if self._yields(each) <= now]
                if not silent:
                    break
                self._evict(min(silent, key=lambda each: each.heard), step)
            if lack == "total":
                return  # nobody overtakes it: a large update would wait for ever
            if lack is None:
                self._start(update, step, now)

    def _lack(self, update: _Update[T]) -> str | None:
        """What keeps an update from beginning: its `device`'s share is full, or the `total`."""
        bounds, share = self._bounds, self._shares[update.device]
        if share.updates >= bounds.device_updates or share.size + update.size > bounds.device_size:
            return "device"
        full = len(self._collecting) >= bounds.updates or self._size + update.size > bounds.size
        return "total" if full else None

    def _start(self, update: _Update[T], step: Step[T], now: float) -> None:
        del self._waiting[update.device, update.name]
        self._collecting[update.device, update.name] = update
        share = self._shares[update.device]
        share.waiting -= 1
        share.updates += 1
        share.size += update.size
        self._size += update.size
        # Not filled with zeros, so the kernel gives a page only when a chunk is written to it.
        update.buffer = np.empty(update.size, np.uint8).data
        update.began = update.heard = now
        self._ask(update, step, now, again=False)

    def _evict(self, update: _Update[T], step: Step[T]) -> None:
        self._forget(update)
        step.evicted.append(update.item)

    def _forget(self, update: _Update[T]) -> None:
        share = self._shares[update.device]
        if self._collecting.pop((update.device, update.name), None) is None:
            del self._waiting[update.device, update.name]
            share.waiting -= 1
        else:
            share.updates -= 1
            share.size -= update.size
            self._size -= update.size
        self._drop_empty(update.device)

    def _drop_empty(self, device: str) -> None:
        share = self._shares[device]
        if share.updates == share.waiting == 0:
            del self._shares[device]
