"""Blobs are whole, checked when read, and stored once."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from aggregator.blobs import Blobs
from aggregator.ports import BlobLost
from shared.errors import LocalProtocolError, StorageError
from tests.unit.full_disk import filled, small_disk


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


def test_pieces(tmp_path: Path) -> None:
    """Long and short-lived bytes alike are read by the piece, and their size is told; what is not there is lost."""
    blobs = Blobs(tmp_path / "blobs")
    long, short = bytes(range(200)), bytes(range(100, 250))
    blobs.put_all({sha256(short).digest(): short})
    for name, data in ((blobs.put(long), long), (sha256(short).digest(), short)):
        assert blobs.size(name) == len(data)
        assert [blobs.read(name, at, 64) for at in range(0, 256, 64)] == [
            data[at : at + 64] for at in range(0, 256, 64)
        ]
    asks: list[Callable[[bytes], object]] = [blobs.get, blobs.size, lambda name: blobs.read(name, 0, 1)]
    for ask in asks:
        with pytest.raises(BlobLost, match="cannot be read"):
            ask(b"n" * 32)


def test_short_lived(tmp_path: Path) -> None:
    """They are named among all, checked like all, and gone when they are forgotten; the others stay."""
    blobs = Blobs(tmp_path / "blobs")
    bodies = {sha256(each).digest(): each for each in (b"one", b"two")}
    name = blobs.put(b"weights")
    blobs.put_all(bodies)
    assert sorted(blobs.names()) == sorted([name, *bodies])
    assert sorted(path.suffix for path in (tmp_path / "blobs").iterdir()) == ["", ".segment"]
    (path,) = (tmp_path / "blobs").glob("*.segment")
    path.write_bytes(path.read_bytes().replace(b"two", b"too"))
    one, two = bodies
    assert blobs.get(one) == b"one"
    with pytest.raises(BlobLost, match="damaged"):
        blobs.get(two)
    blobs.delete(one)
    blobs.delete(two)
    assert blobs.names() == [name]
    blobs.close()
    again = Blobs(tmp_path / "blobs")
    assert (again.names(), [path.name for path in (tmp_path / "blobs").iterdir()]) == ([name], [name.hex()])


def test_a_body_of_an_earlier_program(tmp_path: Path) -> None:
    """Which kept each in a file of its own: it is found, and goes when it is forgotten."""
    blobs = Blobs(tmp_path / "blobs")
    name = sha256(b"body").digest()
    (tmp_path / "blobs" / name.hex()).write_bytes(b"body")
    assert (blobs.get(name), blobs.names()) == (b"body", [name])
    blobs.delete(name)
    assert blobs.names() == []


def test_a_finished_file_is_taken_over(tmp_path: Path) -> None:
    """It is moved, readable by us alone; a link is not followed, and what is not there does not pass."""
    blobs = Blobs(tmp_path / "blobs")
    name = sha256(b"weights").digest()
    spool = tmp_path / "spool"
    spool.write_bytes(b"weights")
    (tmp_path / "link").symlink_to(spool)
    for wrong in (tmp_path / "link", tmp_path / "nothing"):
        with pytest.raises(StorageError) as caught:
            blobs.put_file(wrong, name)
        assert not caught.value.passing
    assert blobs.names() == []
    blobs.put_file(spool, name)
    assert (blobs.get(name), spool.exists()) == (b"weights", False)
    assert (tmp_path / "blobs" / name.hex()).stat().st_mode & 0o777 == 0o600


def test_a_full_disk(tmp_path: Path) -> None:
    """Nothing has changed, nothing half-written takes the room, and the same works when there is room again."""
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        blobs = Blobs(disk / "blobs")
        weights, body = bytes(50_000), bytes(40_000)
        kept = blobs.put(b"kept")
        writes: list[Callable[[], object]] = [
            lambda: blobs.put(weights),
            lambda: blobs.put_all({sha256(body).digest(): body}),
        ]
        with filled(disk, leave=8192):
            for write in writes * 2:
                with pytest.raises(StorageError) as caught:
                    write()
                assert caught.value.passing
                assert blobs.names() == [kept]
                assert [path.name for path in (disk / "blobs").iterdir()] == [kept.hex()]
        for write in writes:
            write()
        assert (blobs.get(sha256(weights).digest()), blobs.get(sha256(body).digest())) == (weights, body)
