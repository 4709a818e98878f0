"""Chunks: what is cut can be put together again, and no number outside is taken."""

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import chunks
from shared.errors import Reason, RemoteProtocolError


@given(st.binary(max_size=5000), st.integers(1, 6000))
def test_pieces_and_spans_agree(data: bytes, size: int) -> None:
    """The pieces are the spans, joined they are the blob, and the reference names each."""
    found = [bytes(piece) for piece in chunks.pieces(data, size)]
    assert b"".join(found) == data
    assert len(found) == chunks.count(len(data), size)
    for index, piece in enumerate(found):
        start, end = chunks.span(len(data), size, index)
        assert data[start:end] == piece
    blob = chunks.describe(data, size)
    assert blob.chunks == [sha256(piece).digest() for piece in found]
    assert (blob.sha256, blob.size, blob.chunk_size) == (sha256(data).digest(), len(data), size)


@given(st.integers(0, 10_000), st.integers(1, 500))
def test_numbers_outside_are_refused(size: int, chunk: int) -> None:
    """A chunk that the blob does not have is a peer's fault."""
    for index in (-1, chunks.count(size, chunk), 2**32):
        with pytest.raises(RemoteProtocolError) as caught:
            chunks.span(size, chunk, index)
        assert caught.value.reason is Reason.BAD_CHUNK


def test_whole_blobs_have_no_chunks() -> None:
    """A chunk size of 0 says that the blob travels whole."""
    assert chunks.describe(b"abc", 0).chunks == []


def test_chunk_size_follows_the_broker() -> None:
    """A chunk with its packet never exceeds what the broker takes, and is never absurdly small."""
    assert chunks.chunk_size(None) == chunks.chunk_size(1 << 20) == 120 << 10
    assert chunks.chunk_size(65_536) == 65_536 - chunks.PACKET_ROOM
    assert chunks.chunk_size(100) == chunks.CHUNK_MIN
