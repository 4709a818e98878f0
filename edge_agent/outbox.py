"""The updates on their way, on disk: what was sealed stays until the aggregator has answered, through any reboot.

`<id>.body` is the sealed body, which the trainer writes; `<id>.entry` the signed head and what is needed to send it,
written once the body is there. So a body without an entry was never promised to anybody, and an entry whose body is not
what its head says is worth nothing: both go when the agent starts. Both hold ciphertext and signatures, no secret.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from edge_agent.delivery import Update
from shared import chunks, wire
from shared.errors import RemoteProtocolError, StorageError
from shared.files import write_durably
from shared.messages import First, Label, Name, Positive, Uint, UpdateHead, Wire

_ENTRY_MAX = 64 << 10
_READ = 1 << 20
"""Bytes read at a time."""


class Entry(Wire, frozen=True):
    """What lies beside a body; `sig` is the device's signature over `head`."""

    v: First
    id: Label
    task: Name
    position: Annotated[list[Uint], Meta(min_length=2, max_length=2)]
    shards: Positive
    expires: Uint
    head: Annotated[bytes, Meta(min_length=1, max_length=16_384)]
    sig: Annotated[bytes, Meta(min_length=8, max_length=128)]


@dataclass(frozen=True, slots=True)
class Damaged:
    """An entry that cannot be sent any more, and why."""

    id: str
    why: str


class Outbox:
    """A folder; used by the owner thread alone. The trainer writes the bodies."""

    def __init__(self, folder: Path) -> None:
        """`folder` must exist."""
        self._folder = folder
        self._signatures: dict[str, bytes] = {}

    def load(self) -> list[Update | Damaged]:
        """All that an earlier process left, the oldest first; what is damaged or of no use is deleted."""
        found: list[Update | Damaged] = []
        for path in sorted(self._folder.glob("*.entry")):
            id = path.name.removesuffix(".entry")
            try:
                found.append(self._load(id, path))
            except RemoteProtocolError as error:
                found.append(Damaged(id, str(error)))
            except OSError as error:
                found.append(Damaged(id, error.strerror or str(error)))
        kept = {each.id for each in found if isinstance(each, Update)}
        for path in list(self._folder.iterdir()):
            if path.name not in {f"{id}.{kind}" for id in kept for kind in ("body", "entry")}:
                with contextlib.suppress(OSError):
                    path.unlink()
        return sorted(found, key=lambda each: each.position if isinstance(each, Update) else (0, 0))

    def body(self, id: str) -> Path:
        """Where the trainer puts the body of a job, and where it is read from."""
        return self._folder / f"{id}.body"

    def keep(self, update: Update, signature: bytes) -> None:
        """Make an update durable; StorageError if the disk refuses."""
        entry = Entry(
            v=1,
            id=update.id,
            task=update.task,
            position=list(update.position),
            shards=update.shards,
            expires=update.expires,
            head=update.head,
            sig=signature,
        )
        packed = wire.pack(entry)
        path = self._folder / f"{update.id}.entry"
        try:
            write_durably(path, sha256(packed).digest() + packed)
        except OSError as error:
            raise StorageError.of(path, error) from None
        self._signatures[update.id] = signature

    def signature(self, id: str) -> bytes:
        """The signature over the head of a kept update."""
        return self._signatures[id]

    def read(self, update: Update, index: int | None = None) -> bytes:
        """A chunk of the body, or all of one that rides along; StorageError if it is not there."""
        start, end = (0, update.size) if index is None else chunks.span(update.size, update.chunk_size, index)
        path = self.body(update.id)
        try:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                data = os.pread(file, end - start, start)
            finally:
                os.close(file)
        except OSError as error:
            raise StorageError.of(path, error) from None
        if len(data) != end - start:
            raise StorageError(str(path), f"ends before byte {end}", passing=False)
        return data

    def drop(self, id: str) -> None:
        """Delete what there is of an update, or of a job that came to nothing. A disk that refuses keeps it longer."""
        self._signatures.pop(id, None)
        for kind in ("entry", "body"):  # in this order: a body alone is nothing
            with contextlib.suppress(OSError):
                (self._folder / f"{id}.{kind}").unlink(missing_ok=True)

    def _load(self, id: str, path: Path) -> Update:
        with path.open("rb") as file:
            data = file.read(_ENTRY_MAX)
        if sha256(data[32:]).digest() != data[:32]:
            raise OSError(0, "its entry is damaged")
        entry = wire.unpack(data[32:], Entry, _ENTRY_MAX)
        head = wire.unpack(entry.head, UpdateHead)
        digest = sha256()
        size = 0
        for piece in _pieces(self.body(id)):
            digest.update(piece)
            size += len(piece)
        if entry.id != id or size != head.size or digest.digest() != head.sha256:
            raise OSError(0, "its body is damaged")
        self._signatures[id] = entry.sig
        return Update(
            id,
            entry.task,
            (entry.position[0], entry.position[1]),
            entry.head,
            sha256(entry.head).digest(),
            entry.shards,
            head.size,
            head.chunk_size,
            entry.expires,
        )


def _pieces(path: Path) -> Iterator[bytes]:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        while piece := file.read(_READ):
            yield piece
