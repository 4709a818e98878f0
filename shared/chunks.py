"""How bytes are cut into chunks and which chunk is which: the one arithmetic that senders and receivers share. Pure."""

from collections.abc import Iterator
from hashlib import sha256

from shared.errors import Reason, RemoteProtocolError
from shared.messages import BlobRef

CHUNK_SIZE = 120 << 10
"""Bytes of a chunk: fits the 128 KiB that hosted brokers take in one message."""
INLINE_MAX = 64 << 10
"""Bytes up to which weights ride in the release's message and a body beside its head."""
CHUNK_MIN = 1 << 10
"""Bytes of the smallest chunk that is taken; smaller ones would only cost messages."""
PACKET_ROOM = 1 << 10
"""Bytes that a packet needs beside its payload."""


def chunk_size(packet_max: int | None) -> int:
    """Bytes of a chunk for a broker that takes packets of at most `packet_max` (None: any)."""
    return CHUNK_SIZE if packet_max is None else max(CHUNK_MIN, min(CHUNK_SIZE, packet_max - PACKET_ROOM))


def count(size: int, chunk: int) -> int:
    """Chunks of `chunk` bytes that `size` bytes make."""
    return -(-size // chunk)


def span(size: int, chunk: int, index: int) -> tuple[int, int]:
    """(start, end) of chunk `index` in a blob of `size` bytes; RemoteProtocolError if it has none of that number."""
    start = index * chunk
    if not 0 <= start < size:
        raise RemoteProtocolError(Reason.BAD_CHUNK, f"chunk {index} of {count(size, chunk)}")
    return start, min(start + chunk, size)


def pieces(data: bytes | memoryview, chunk: int) -> Iterator[memoryview]:
    """`data` cut into chunks, without copies."""
    view = memoryview(data)
    return (view[start : start + chunk] for start in range(0, len(view), chunk))


def describe(data: bytes | memoryview, chunk: int) -> BlobRef:
    """The reference to `data`: in chunks of that many bytes, or whole where `chunk` is 0."""
    hashes = [sha256(piece).digest() for piece in pieces(data, chunk)] if chunk else []
    return BlobRef(sha256(data).digest(), len(data), chunk, hashes)
