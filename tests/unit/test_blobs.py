"""Blobs are whole, checked when read, and stored once."""

from hashlib import sha256
from pathlib import Path

import pytest

from aggregator.blobs import Blobs
from shared.errors import LocalProtocolError


def test_blob(tmp_path: Path) -> None:
    """Bytes come back under their sha256; storing them again is storing them once."""
    blobs = Blobs(tmp_path / "blobs")
    name = blobs.put(b"weights")
    assert name == sha256(b"weights").digest() == blobs.put(memoryview(bytearray(b"weights")))
    assert blobs.get(name) == b"weights"
    assert blobs.names() == [name]
    assert blobs.get(blobs.put(b"")) == b""
    assert Blobs(tmp_path / "blobs").get(name) == b"weights"


def test_blob_deleted(tmp_path: Path) -> None:
    """What is forgotten is gone; forgetting it again is nothing."""
    blobs = Blobs(tmp_path / "blobs")
    name = blobs.put(b"x")
    blobs.delete(name)
    blobs.delete(name)
    assert blobs.names() == []
    with pytest.raises(LocalProtocolError, match="cannot be read"):
        blobs.get(name)


@pytest.mark.parametrize("content", [b"weightz", b"weight", b"weights!", b""])
def test_blob_damaged(tmp_path: Path, content: bytes) -> None:
    """Bytes that are not what their name says are never handed out."""
    blobs = Blobs(tmp_path / "blobs")
    name = blobs.put(b"weights")
    (tmp_path / "blobs" / name.hex()).write_bytes(content)
    with pytest.raises(LocalProtocolError, match="damaged"):
        blobs.get(name)


def test_blob_repaired(tmp_path: Path) -> None:
    """Storing what lies there damaged makes it good."""
    blobs = Blobs(tmp_path / "blobs")
    name = blobs.put(b"weights")
    (tmp_path / "blobs" / name.hex()).write_bytes(b"weightz")
    blobs.put(b"weights")
    assert blobs.get(name) == b"weights"


def test_blob_half_written(tmp_path: Path) -> None:
    """What a crash left beside the blobs is none of them, and the next try replaces it."""
    blobs = Blobs(tmp_path / "blobs")
    name = sha256(b"weights").digest()
    (tmp_path / "blobs" / f".{name.hex()}.new").write_bytes(b"wei")
    assert blobs.names() == []
    with pytest.raises(LocalProtocolError):
        blobs.get(name)
    assert blobs.put(b"weights") == name
    assert (blobs.names(), blobs.get(name)) == ([name], b"weights")
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == [name.hex()]
