"""Keeps a message that kills the process from killing it for ever.

    unknown --in hand when the process dies--> suspect --handled alone, dies--> suspect --alone, dies--> condemned
                                               suspect --handled alone, lives--> unknown

What is in hand is noted in a file before it is handled. The note is for the death of the process, not of the machine:
it is never fsynced. A condemned message is kept on disk for whoever mends the fault, and is not handled again as long
as it lies there.

It must never look into a payload: that may be what kills.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from shared.driver import read_clock
from shared.events import Event
from shared.logs import tell
from shared.mqtt import Message

E = TypeVar("E")

ALONE_MAX = 2
"""Deaths of the process, with nothing else in hand, that condemn a message."""
_FILES_MAX = 100
_BYTES_MAX = 256 << 20
"""Of all files together. The oldest go first; what they hold may then do its harm once more."""
_SUSPECTS_MAX = 256
_SAMPLE = 64


def fingerprint(message: Message) -> str:
    """A name for a message that costs no more for a large one, and tells it from any other that is not made to fit."""
    payload = message.payload
    ends = bytes(payload[:_SAMPLE]) + bytes(payload[-_SAMPLE:])
    return f"{message.topic} {len(payload)} {sha256(ends).hexdigest()}"


class Quarantine:
    """The note of what is in hand, the suspects, and the folder of the condemned."""

    def __init__(self, state: Path) -> None:
        """`state` is the daemon's directory; what a death left in its note is suspect from now on."""
        self._folder = state / "quarantine"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._condemned = {path.name for path in self._files()}
        self._note = os.open(state / "in-hand", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        self._suspects = self._read()
        self._write([])

    def __len__(self) -> int:
        return len(self._condemned)

    def close(self) -> None:
        """The process ends, and not because of a message: what is in hand is not suspect for that."""
        self._write([])
        os.close(self._note)

    def holds(self, name: str) -> bool:
        """Whether what goes by this name is condemned."""
        return bool(self._condemned) and _hashed(name) in self._condemned

    def portions(self, batch: Sequence[E], name_of: Callable[[E], str | None]) -> Iterator[Sequence[E]]:
        """The batch in its order, cut so that every suspect is alone; a portion is done when the next is asked for.

        `name_of` is asked before anything of the batch is handled; what has no name kills nobody.
        """
        group: list[E] = []
        hand: list[str] = []
        for event, name in [(event, name_of(event)) for event in batch]:
            hashed = None if name is None else _hashed(name)
            if hashed is None or hashed in self._condemned or hashed not in self._suspects:
                group.append(event)
                hand += [] if hashed is None else [hashed]
                continue
            if self._suspects[hashed] >= ALONE_MAX and isinstance(event, Message):
                self._condemn(hashed, event)
                group.append(event)
                continue
            if group:
                yield from self._hand_over(group, hand)
                group, hand = [], []
            yield from self._hand_over([event], [hashed], alone=True)
            del self._suspects[hashed]
            self._write([])
        if group:
            yield from self._hand_over(group, hand)

    def _hand_over(self, group: Sequence[E], hand: Sequence[str], *, alone: bool = False) -> Iterator[Sequence[E]]:
        if hand:
            self._write(hand, alone=alone)
        yield group
        if hand:
            self._write([])

    def _condemn(self, hashed: str, message: Message) -> None:
        del self._suspects[hashed]
        self._condemned.add(hashed)
        path = self._folder / hashed
        head = json.dumps({"topic": message.topic, "bytes": len(message.payload), "at": int(read_clock().utc)})
        # Without room it is condemned until the next start, and then once more after two deaths.
        with contextlib.suppress(OSError):
            self._make_room(len(message.payload))
            path.write_bytes(head.encode() + b"\n" + message.payload)
        tell(Event.MESSAGE_QUARANTINED, topic=message.topic, bytes=len(message.payload), file=str(path))

    def _make_room(self, size: int) -> None:
        files = sorted(self._files(), key=lambda path: path.stat().st_mtime)
        used = sum(path.stat().st_size for path in files)
        while files and (len(files) >= _FILES_MAX or used + size > _BYTES_MAX):
            oldest = files.pop(0)
            used -= oldest.stat().st_size
            oldest.unlink()
            self._condemned.discard(oldest.name)

    def _files(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if path.is_file()]

    def _read(self) -> dict[str, int]:
        size = os.fstat(self._note).st_size
        try:
            note = json.loads(os.pread(self._note, size, 0).partition(b"\n")[0])
            suspects = {str(name): int(deaths) for name, deaths in note["suspects"].items()}
            for name in note["hand"]:
                suspects[name] = suspects.get(name, 0) + bool(note["alone"])
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}  # none yet, or torn: whatever kills will be noted again
        return dict(list(suspects.items())[-_SUSPECTS_MAX:])

    def _write(self, hand: Sequence[str], *, alone: bool = False) -> None:
        note = json.dumps({"hand": hand, "alone": alone, "suspects": self._suspects})
        # In place, and a line of its own, so that nothing of a longer one behind it is read. On a full disk the note
        # may not fit; then a death goes unnoticed, which is better than to cause one.
        with contextlib.suppress(OSError):
            os.pwrite(self._note, note.encode() + b"\n", 0)


def _hashed(name: str) -> str:
    return sha256(name.encode()).hexdigest()[:32]
