"""Bytes under their sha256 in one directory, behind the port Blobs.

Written whole (temporary file, fsync, rename) and checked when read. It knows nothing of what they are.
"""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aggregator import ports
from aggregator.ports import BlobLost, Bytes
from shared.files import write_durably

_WRITERS = 4
"""Threads that write bodies; measured on a virtual disk: 3 ms for each file of 4 MB, with one thread 8."""


class Blobs(ports.Blobs):
    """Content-addressed files below one directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        for left in directory.glob(".*.new"):
            left.unlink()  # a crash came while it was written
        # A disk syncs several files at once in little more than the time of one.
        self._writers = ThreadPoolExecutor(_WRITERS, "blobs")

    def close(self) -> None:
        """Let everything go."""
        self._writers.shutdown()

    def put(self, data: Bytes) -> bytes:
        """Store bytes durably; returns their sha256. Storing them twice is storing them once."""
        name = hashlib.sha256(data).digest()
        self._keep(name, data)
        return name

    def put_all(self, pieces: Mapping[bytes, Bytes]) -> None:
        """Store several bytes durably, by the sha256 that the caller has found them to have."""
        list(self._writers.map(self._keep, pieces, pieces.values()))

    def put_file(self, path: Path, name: bytes) -> None:
        """Take over a finished file of this file system, durably; `path` is gone."""
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.replace(self._path(name))
        folder = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def get(self, name: bytes) -> bytes:
        """The bytes of that sha256, else BlobLost."""
        try:
            data = self._path(name).read_bytes()
        except OSError as error:
            raise BlobLost(f"blob {name.hex()} cannot be read: {error.strerror}") from None
        if hashlib.sha256(data).digest() != name:
            raise BlobLost(f"blob {name.hex()} is damaged on disk")
        return data

    def read(self, name: bytes, offset: int, length: int) -> bytes:
        """A piece of them, shorter at the end, else BlobLost. Only whoever knows the piece's own hash can trust it."""
        try:
            with self._path(name).open("rb", buffering=0) as file:
                return os.pread(file.fileno(), length, offset)
        except OSError as error:
            raise BlobLost(f"blob {name.hex()} cannot be read: {error.strerror}") from None

    def size(self, name: bytes) -> int:
        """How many bytes they are, else BlobLost."""
        try:
            return self._path(name).stat().st_size
        except OSError as error:
            raise BlobLost(f"blob {name.hex()} cannot be read: {error.strerror}") from None

    def delete(self, name: bytes) -> None:
        """Forget bytes; those that are not there are forgotten already."""
        self._path(name).unlink(missing_ok=True)

    def names(self) -> list[bytes]:
        """All that is stored."""
        return [bytes.fromhex(path.name) for path in self._directory.iterdir() if len(path.name) == 64]

    def _keep(self, name: bytes, data: Bytes) -> None:
        path = self._path(name)
        # What lies there may be damaged; then this is what repairs it.
        if not (path.exists() and path.read_bytes() == data):
            write_durably(path, data)

    def _path(self, name: bytes) -> Path:
        return self._directory / name.hex()
