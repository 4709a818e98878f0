"""The download of one blob in chunks: which topics to subscribe to, what to keep of what comes, when to give up. Pure.

    asking --chunk--> asking ... --last chunk--> done
    asking --empty payload--> gone            asking --no chunk for PATIENCE s while connected--> stalled

At most WINDOW chunks are subscribed to at a time, so that a slow link holds at most that much in flight; half of them
are replaced at once when they have come. It never holds a chunk: the caller writes what `arrived` lets through.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from hashlib import sha256

from shared import chunks
from shared.errors import Reason, RemoteProtocolError
from shared.messages import BlobRef

WINDOW = 16
"""Chunk topics that are subscribed to at a time."""
PATIENCE = 60.0
"""Seconds without a chunk, while connected, after which a download is given up."""


class Progress(Enum):
    """Where a download stands after a step."""

    GOING = "going"
    DONE = "done"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Step:
    """What to do next, in this order: write the chunk that came (if `write`), unsubscribe, subscribe."""

    write: bool
    unsubscribe: tuple[int, ...]
    subscribe: tuple[int, ...]
    progress: Progress


class Fetch:
    """One download; `missing` are the numbers of the chunks that are not there yet."""

    def __init__(self, blob: BlobRef, missing: Iterable[int], now: float) -> None:
        self.blob = blob
        self._waiting = sorted(missing, reverse=True)
        self._asked: set[int] = set()
        self._settled: list[int] = []
        """Subscribed to, and there already."""
        self._heard: float | None = now
        """Monotonic seconds of the last chunk, or of the connection; None while there is none."""

    @property
    def left(self) -> int:
        """Chunks that have not come."""
        return len(self._waiting) + len(self._asked)

    @property
    def bytes_left(self) -> int:
        """Their bytes together."""
        spans = (chunks.span(self.blob.size, self.blob.chunk_size, index) for index in (*self._waiting, *self._asked))
        return sum(end - start for start, end in spans)

    @property
    def deadline(self) -> float | None:
        """Monotonic seconds at which it is stalled; None while there is no connection."""
        return None if self._heard is None else self._heard + PATIENCE

    def connected(self, now: float) -> tuple[int, ...]:
        """The chunks to subscribe to on a new connection, which may know of some or of none."""
        self._heard = now
        self._take(WINDOW - len(self._asked))
        return tuple(sorted(self._asked))

    def disconnected(self) -> None:
        """Wait for the next connection without losing patience."""
        self._heard = None

    def arrived(self, index: int, payload: bytes | bytearray | memoryview, now: float) -> Step:
        """Take a chunk of this blob; RemoteProtocolError, and nothing has changed, for one that does not belong."""
        if index not in self._asked:
            # They are asked for in rising order, so what lies before the next one is here: it was published once more,
            # or was on its way when it was unsubscribed.
            if 0 <= index < (self._waiting[-1] if self._waiting else len(self.blob.chunks)):
                return Step(False, (), (), Progress.GOING)
            raise RemoteProtocolError(Reason.UNASKED, f"chunk {index} of {self.blob.sha256.hex()[:16]}")
        if not len(payload):
            return Step(False, self.given_up(), (), Progress.GONE)
        if sha256(payload).digest() != self.blob.chunks[index]:
            raise RemoteProtocolError(Reason.WRONG_DIGEST, f"chunk {index} of {self.blob.sha256.hex()[:16]}")
        self._asked.remove(index)
        self._settled.append(index)
        self._heard = now
        if not self.left:
            return Step(True, self.given_up(), (), Progress.DONE)
        if not self._waiting or len(self._asked) > WINDOW // 2:
            return Step(True, (), (), Progress.GOING)
        settled, self._settled = tuple(self._settled), []
        return Step(True, settled, self._take(WINDOW - len(self._asked)), Progress.GOING)

    def given_up(self) -> tuple[int, ...]:
        """The chunks to unsubscribe from when nothing more is wanted."""
        return tuple(sorted(self._asked | set(self._settled)))

    def _take(self, count: int) -> tuple[int, ...]:
        taken = tuple(self._waiting.pop() for _ in range(min(count, len(self._waiting))))
        self._asked.update(taken)
        return taken
