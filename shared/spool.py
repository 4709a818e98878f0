"""The file that a blob is downloaded into, chunk by chunk, in place.

It is the only memory of a download: after a crash or a power cut `missing` hashes what lies there and names the rest.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from shared import chunks
from shared.errors import Reason, RemoteProtocolError, StorageError
from shared.messages import BlobRef

_FLUSH_EVERY = 64
"""Chunks after which they are on the disk, whatever happens to the power."""
_READ = 1 << 20
"""Bytes read at a time."""


class Spool:
    """One blob's file. Every method but `discard` raises StorageError when the disk does not play along."""

    def __init__(self, path: Path, blob: BlobRef, reserve: int = 0) -> None:
        """`path` need not exist; `reserve` are the bytes of free space that the download must leave."""
        self.path, self.blob = path, blob
        self._reserve, self._unflushed = reserve, 0

    def missing(self) -> list[int]:
        """The numbers of the chunks that are not there, whole; makes the file, and room for it."""
        with self._guarded():
            there = self.path.exists() and self.path.stat().st_size == self.blob.size
            found = [index for index in range(len(self.blob.chunks)) if not (there and self._holds(index))]
            free = os.statvfs(self.path.parent)
            need = min(len(found) * self.blob.chunk_size, self.blob.size)
            if free.f_bavail * free.f_frsize < need + self._reserve:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if not there:
                with open(
                    os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb"
                ) as new:
                    new.truncate(self.blob.size)
        return found

    def write(self, index: int, data: bytes | bytearray | memoryview) -> None:
        """Put a chunk, which the caller has verified, in its place."""
        start, end = chunks.span(self.blob.size, self.blob.chunk_size, index)
        if len(data) != end - start:
            raise RemoteProtocolError(Reason.BAD_CHUNK, f"chunk {index} has {len(data)} bytes, not {end - start}")
        with self._guarded():
            file = os.open(self.path, os.O_WRONLY | os.O_NOFOLLOW)
            try:
                if os.pwrite(file, data, start) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._unflushed += 1
                if self._unflushed >= _FLUSH_EVERY:
                    os.fdatasync(file)
                    self._unflushed = 0
            finally:
                os.close(file)

    def finish(self, target: Path) -> None:
        """Move the whole blob to `target`, durably. RemoteProtocolError if it is not what it should be."""
        with self._guarded():
            digest = sha256()
            with self.path.open("rb") as file:
                while piece := file.read(_READ):
                    digest.update(piece)
                os.fsync(file.fileno())
            if digest.digest() != self.blob.sha256:
                # Every chunk was as signed, so whoever signed them contradicts himself.
                self.discard()
                raise RemoteProtocolError(Reason.WRONG_DIGEST, "the chunks are not the blob that they were signed for")
            os.replace(self.path, target)
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def discard(self) -> None:
        """Delete the file, if it is there."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _holds(self, index: int) -> bool:
        start, end = chunks.span(self.blob.size, self.blob.chunk_size, index)
        digest = sha256()
        file = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            # In pieces: how large a chunk is was decided by whoever signed for it.
            for at in range(start, end, _READ):
                digest.update(os.pread(file, min(_READ, end - at), at))
        finally:
            os.close(file)
        return digest.digest() == self.blob.chunks[index]

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError.of(self.path, error) from None
