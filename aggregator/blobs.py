"""Bytes under their sha256 in one directory, behind the port Blobs.

What stays long (graphs, weights) is a file each, written beside, synchronised and renamed. What goes soon (bodies of
updates) is appended to the journal's segments. Everything is checked when it is read. It knows nothing of what they
are, and forgetting need not reach the disk: the service sweeps when it starts.
"""

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from aggregator import ports
from aggregator.journal import SEGMENT_BYTES, Journal
from aggregator.ports import BlobLost, Bytes
from shared.errors import StorageError
from shared.files import sync_folder, write_durably


def file_of(directory: Path, name: bytes) -> Path:
    """Where bytes that stay long lie."""
    return directory / name.hex()


class Blobs(ports.Blobs):
    """See the module. One thread uses it, and one process writes."""

    def __init__(self, directory: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for left in directory.glob(".*.new"):
                left.unlink()  # a crash came while it was written
        except OSError as error:
            raise StorageError.of(directory, error) from error
        self._directory = directory
        self._journal = Journal(directory, segment_bytes)

    def close(self) -> None:
        """Let everything go."""
        self._journal.close()

    def put(self, data: Bytes) -> bytes:
        """Store bytes that stay long, durably; returns their sha256. Storing them twice is storing them once."""
        name = hashlib.sha256(data).digest()
        path = file_of(self._directory, name)
        try:
            # What lies there may be damaged; then this is what repairs it.
            if not (path.exists() and path.read_bytes() == data):
                write_durably(path, data)
        except OSError as error:
            raise StorageError.of(path, error) from error
        return name

    def put_all(self, pieces: Mapping[bytes, Bytes]) -> None:
        """Store bytes that go soon, together and durably, by the sha256 that the caller has found them to have."""
        self._journal.append(pieces)

    def put_file(self, path: Path, name: bytes) -> None:
        """Take over a finished file of this file system, durably; `path` is gone."""
        try:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fchmod(file, 0o600)
                os.fsync(file)
            finally:
                os.close(file)
            path.replace(file_of(self._directory, name))
            sync_folder(self._directory)
        except OSError as error:
            raise StorageError.of(path, error) from error

    def get(self, name: bytes) -> bytes:
        """The bytes of that sha256, else BlobLost."""
        data = self.read(name, 0, self.size(name))
        if hashlib.sha256(data).digest() != name:
            raise BlobLost(f"blob {name.hex()} is damaged on disk")
        return data

    def read(self, name: bytes, offset: int, length: int) -> bytes:
        """A piece of them, shorter at the end, else BlobLost. Only whoever knows the piece's own hash can trust it."""
        if name in self._journal:
            return self._journal.read(name, offset, length)
        try:
            with file_of(self._directory, name).open("rb", buffering=0) as file:
                file.seek(offset)
                return file.read(length)
        except OSError as error:
            raise BlobLost(f"blob {name.hex()} cannot be read: {error.strerror}") from None

    def size(self, name: bytes) -> int:
        """How many bytes they are, else BlobLost."""
        if name in self._journal:
            return self._journal.size(name)
        try:
            return file_of(self._directory, name).stat().st_size
        except OSError as error:
            raise BlobLost(f"blob {name.hex()} cannot be read: {error.strerror}") from None

    def delete(self, name: bytes) -> None:
        """Forget bytes; those that are not there are forgotten already."""
        if name in self._journal:
            self._journal.forget(name)
            with contextlib.suppress(StorageError):  # a disk that is full now may be tidied another time
                self._journal.tidy()
        with contextlib.suppress(OSError):
            file_of(self._directory, name).unlink(missing_ok=True)

    def names(self) -> list[bytes]:
        """All that is stored."""
        files = [bytes.fromhex(path.name) for path in self._directory.iterdir() if len(path.name) == 64]
        return list({*files, *self._journal.names()})
