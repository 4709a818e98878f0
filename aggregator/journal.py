"""Short-lived bytes under their sha256, appended to segment files: one synchronised write for a batch of them.

    segment: 00000001.segment = MAGIC, salt; then records, to about 64 MiB
    record:  salt, sha256, length, CRC-32 of these three; then the bytes

The salt is drawn for each segment, so no record can carry what looks like another one. Which records there are is told
by their headers alone, read when the journal is opened: behind a damaged header the next sound one is looked for, a
torn tail is cut off. What a record holds is checked when it is read. Forgetting is in memory only: a segment goes when
nothing in it is wanted, and what else was forgotten is there again at the next opening.

One thread uses it, and one process writes it. It must never trust a record that it has not hashed.
"""

import contextlib
import errno
import os
import secrets
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from aggregator.ports import BlobLost, Bytes
from shared.errors import StorageError
from shared.files import sync_folder

SEGMENT_BYTES = 64 << 20
"""Of one file, after which the next one begins; a larger batch has a file of its own."""
_WASTE = 4
"""Segments' worth of forgotten bytes, beyond as many as are wanted, from which on wanted ones are moved together."""
_MAGIC = b"fieldfare-blobs1"
_SALT = 16
_BEGIN = len(_MAGIC) + _SALT
_HEADER = struct.Struct(f"<{_SALT}s32sQI4x")
_IOV_MAX = 512
"""Buffers of one write; the kernel takes 1,024."""
_BLOCK = 1 << 20
"""Bytes read at a time where a sound header is looked for."""


@dataclass(slots=True, eq=False)
class _Segment:
    path: Path
    salt: bytes
    size: int
    live: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    """Offset and length of each wanted record."""
    wanted: int = 0
    """Their bytes."""


class Journal:
    """See the module. Every method that writes raises StorageError where the disk refuses, having changed nothing."""

    def __init__(self, directory: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._directory, self._segment_bytes = directory, segment_bytes
        self._segments: list[_Segment] = []
        self._where: dict[bytes, _Segment] = {}
        self._current: _Segment | None = None
        self._file = -1
        self._last = 0
        for path in sorted(directory.glob("[0-9]*.segment")):
            self._last = max(self._last, int(path.stem))
            try:
                self._open(path)
            except OSError as error:
                raise StorageError.of(path, error) from error
        for segment in list(self._segments):
            self._drop_if_empty(segment)

    def close(self) -> None:
        """Let the files go."""
        if self._current is not None:
            os.close(self._file)
            self._current, self._file = None, -1

    def names(self) -> list[bytes]:
        """All that is wanted."""
        return list(self._where)

    def __contains__(self, name: bytes) -> bool:
        return name in self._where

    def append(self, pieces: Mapping[bytes, Bytes]) -> None:
        """Store bytes durably by the sha256 that the caller has found them to have; those that are there stay."""
        self._write({name: data for name, data in pieces.items() if not self._sound(name)})

    def read(self, name: bytes, offset: int = 0, length: int | None = None) -> bytes:
        """A piece of the bytes as they lie there, all from `offset` on by default; BlobLost if they are not."""
        segment = self._where[name]
        start, size = segment.live[name]
        wanted = max(0, min(size - offset, size if length is None else length))
        try:
            with segment.path.open("rb", buffering=0) as file:
                file.seek(start + offset)
                data = file.read(wanted)
        except OSError as error:
            raise BlobLost(f"blob {name.hex()} cannot be read: {error.strerror}") from None
        if len(data) != wanted:
            raise BlobLost(f"blob {name.hex()} is damaged on disk")
        return data

    def size(self, name: bytes) -> int:
        """How many bytes they are."""
        return self._where[name].live[name][1]

    def forget(self, name: bytes) -> None:
        """They are not wanted any more; where nothing else in their file is, it goes."""
        segment = self._where.get(name)
        if segment is not None:
            self._unlist(name)
            self._drop_if_empty(segment)

    def tidy(self) -> None:
        """Where far more is forgotten than wanted, move what is wanted out of the file that holds the least of it.

        For bytes that are wanted much longer than those written beside them, and would keep a whole file each.
        """
        while self._wasted() and (others := [each for each in self._segments if each is not self._current]):
            least = min(others, key=lambda each: each.wanted)
            # Written first: until then a crash must find them where they are.
            self._write({name: self.read(name) for name in list(least.live) if self._sound(name)})
            for damaged in list(least.live):
                self._unlist(damaged)
            self._drop_if_empty(least)

    # -- records --

    def _write(self, pieces: Mapping[bytes, Bytes]) -> None:
        """Append them, whether they are there or not, and look for them here from now on."""
        if not pieces:
            return
        try:
            segment = self._room(sum(_HEADER.size + len(data) for data in pieces.values()))
            buffers: list[Bytes] = []
            places: dict[bytes, tuple[int, int]] = {}
            end = segment.size
            for name, data in pieces.items():
                buffers += [_header(segment.salt, name, len(data)), data]
                places[name] = (end + _HEADER.size, len(data))
                end += _HEADER.size + len(data)
            _write(self._file, buffers, segment.size)
            os.fdatasync(self._file)
        except OSError as error:
            raise StorageError.of(self._retreat(), error) from error
        segment.size = end
        for name, place in places.items():
            before = self._where.get(name)
            self._list(name, segment, place)
            if before is not None:
                self._drop_if_empty(before)

    def _list(self, name: bytes, segment: _Segment, place: tuple[int, int]) -> None:
        self._unlist(name)
        self._where[name] = segment
        segment.live[name] = place
        segment.wanted += place[1]

    def _unlist(self, name: bytes) -> None:
        segment = self._where.pop(name, None)
        if segment is not None:
            segment.wanted -= segment.live.pop(name)[1]

    def _sound(self, name: bytes) -> bool:
        """Whether these bytes are there, and are what their name says."""
        try:
            return name in self._where and sha256(self.read(name)).digest() == name
        except BlobLost:
            return False

    # -- segments --

    def _open(self, path: Path) -> None:
        """Find the records of a file by their headers."""
        with path.open("rb", buffering=0) as file:
            begin = file.read(_BEGIN)
            if len(begin) < _BEGIN or not begin.startswith(_MAGIC):
                path.unlink()  # its beginning never reached the disk, so nothing in it was promised
                return
            size = os.fstat(file.fileno()).st_size
            segment = _Segment(path, begin[len(_MAGIC) :], _BEGIN)
            for at, name, length in _records(file.fileno(), segment.salt, size):
                # Twice, when a crash came while it was moved: the one written last need not be whole.
                if not self._sound(name):
                    self._list(name, segment, (at, length))
                segment.size = at + length
        if segment.size < size:
            os.truncate(path, segment.size)
        self._segments.append(segment)

    def _room(self, wanted: int) -> _Segment:
        """The segment that takes so many bytes more."""
        current = self._current
        if current is not None and (not current.live or current.size + wanted <= self._segment_bytes):
            return current
        self.close()
        path = self._directory / f"{self._last + 1:08}.segment"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        self._last += 1
        segment = self._current = _Segment(path, secrets.token_bytes(_SALT), _BEGIN)
        self._segments.append(segment)
        _write(self._file, [_MAGIC, segment.salt], 0)
        sync_folder(self._directory)
        return segment

    def _retreat(self) -> Path:
        """Leave nothing of a write that failed, and trust its file no further; says which it was."""
        segment = self._current
        if segment is None:
            return self._directory
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, segment.size)
        self.close()
        self._drop_if_empty(segment)
        return segment.path

    def _drop_if_empty(self, segment: _Segment) -> None:
        """A file in which nothing is wanted goes. If it cannot go now, the next opening finds it again."""
        if segment.live or segment not in self._segments:
            return
        if segment is self._current:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, _BEGIN)
                segment.size = _BEGIN
        else:
            self._segments.remove(segment)
            with contextlib.suppress(OSError):
                segment.path.unlink(missing_ok=True)

    def _wasted(self) -> bool:
        size, wanted = sum(each.size for each in self._segments), sum(each.wanted for each in self._segments)
        return size > 2 * wanted + _WASTE * self._segment_bytes


def _header(salt: bytes, name: bytes, length: int) -> bytes:
    checksum = zlib.crc32(_HEADER.pack(salt, name, length, 0))
    return _HEADER.pack(salt, name, length, checksum)


def _records(file: int, salt: bytes, size: int) -> Iterator[tuple[int, bytes, int]]:
    """Offset, name and length of what every sound header announces, as far as it is there whole."""
    at = _BEGIN
    while at < size:
        head = _read(file, _HEADER.size, at)
        if len(head) == _HEADER.size:
            _, name, length, _ = _HEADER.unpack(head)
            if head == _header(salt, name, length) and at + _HEADER.size + length <= size:
                yield at + _HEADER.size, name, length
                at += _HEADER.size + length
                continue
        at = _search(file, salt, at + 1, size)


def _search(file: int, salt: bytes, at: int, size: int) -> int:
    """Where the salt is found from `at` on, else `size`."""
    while at < size:
        found = _read(file, _BLOCK, at).find(salt)
        if found >= 0:
            return at + found
        at += _BLOCK - len(salt) + 1
    return size


def _read(file: int, length: int, at: int) -> bytes:
    try:
        return os.pread(file, length, at)
    except OSError:
        return b""  # a bad sector: what lies there is lost, what lies behind it is not


def _write(file: int, buffers: list[Bytes], offset: int) -> None:
    """All buffers, one after the other, without a copy of them."""
    waiting = [memoryview(each).cast("B") for each in buffers if len(each)]
    while waiting:
        written = os.pwritev(file, waiting[:_IOV_MAX], offset)
        if written <= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        offset += written
        while waiting and written >= len(waiting[0]):
            written -= len(waiting.pop(0))
        if written:
            waiting[0] = waiting[0][written:]
