"""The spool: what lies there is believed only as far as it hashes right, and a whole blob is moved, never copied."""

import os
import tracemalloc
from hashlib import sha256
from pathlib import Path

import pytest

from shared import chunks
from shared.errors import Reason, RemoteProtocolError, StorageError
from shared.messages import BlobRef
from shared.spool import Spool

DATA = os.urandom(10_050)
BLOB = chunks.describe(DATA, 1000)


def fill(spool: Spool, *numbers: int) -> None:
    """Write these chunks."""
    for index in numbers:
        spool.write(index, DATA[index * 1000 : (index + 1) * 1000])


def test_only_what_is_missing_is_named(tmp_path: Path) -> None:
    """A new process finds in the file what an earlier one wrote, and nothing else."""
    spool = Spool(tmp_path / "part", BLOB)
    assert spool.missing() == list(range(11))
    fill(spool, 0, 4, 10)
    assert Spool(tmp_path / "part", BLOB).missing() == [1, 2, 3, 5, 6, 7, 8, 9]


def test_damage_is_missing_again(tmp_path: Path) -> None:
    """A flipped bit on the disk costs one chunk."""
    spool = Spool(tmp_path / "part", BLOB)
    spool.missing()
    fill(spool, *range(11))
    with (tmp_path / "part").open("r+b") as file:
        file.seek(3500)
        file.write(bytes([DATA[3500] ^ 1]))
    assert spool.missing() == [3]


def test_a_file_of_another_size_is_begun_anew(tmp_path: Path) -> None:
    """Whatever lay there under this name was not this blob."""
    (tmp_path / "part").write_bytes(DATA[:5000])
    assert Spool(tmp_path / "part", BLOB).missing() == list(range(11))


def test_finished_blobs_move(tmp_path: Path) -> None:
    """The whole is checked once more and then is the target."""
    spool = Spool(tmp_path / "part", BLOB)
    spool.missing()
    fill(spool, *range(11))
    spool.finish(tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == DATA
    assert not (tmp_path / "part").exists()


def test_a_signer_who_contradicts_himself(tmp_path: Path) -> None:
    """Right chunks of a wrong whole are refused, and the file is gone."""
    lie = BlobRef(b"x" * 32, BLOB.size, BLOB.chunk_size, BLOB.chunks)
    spool = Spool(tmp_path / "part", lie)
    spool.missing()
    fill(spool, *range(11))
    with pytest.raises(RemoteProtocolError) as caught:
        spool.finish(tmp_path / "whole")
    assert caught.value.reason is Reason.WRONG_DIGEST
    assert list(tmp_path.iterdir()) == []


def test_room_is_looked_for_first(tmp_path: Path) -> None:
    """A blob that the disk cannot hold beside the reserve is not begun, and the error says that it may pass."""
    with pytest.raises(StorageError) as caught:
        Spool(tmp_path / "part", BLOB, reserve=1 << 60).missing()
    assert caught.value.passing
    assert not (tmp_path / "part").exists()


def test_a_chunk_of_any_size_is_hashed_in_pieces(tmp_path: Path) -> None:
    """Whoever signs a blob of one huge chunk does not choose how much memory a restarted agent takes."""
    size = 48 << 20
    digest = sha256(bytes(size)).digest()
    spool = Spool(tmp_path / "part", BlobRef(digest, size, 2**62, [digest]))
    assert spool.missing() == [0], "room is needed for what the blob has, not for what a chunk may have"
    tracemalloc.start()
    try:
        assert spool.missing() == [], "the file is of zeros, as the chunk is"
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    """A folder that is gone is a StorageError, whatever is asked."""
    spool = Spool(tmp_path / "gone" / "part", BLOB)
    for act in (spool.missing, lambda: fill(spool, 0), lambda: spool.finish(tmp_path / "whole")):
        with pytest.raises(StorageError):
            act()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """Nobody turns a download into writing elsewhere."""
    (tmp_path / "elsewhere").write_bytes(b"")
    (tmp_path / "part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError):
        Spool(tmp_path / "part", BLOB).missing()
    assert (tmp_path / "elsewhere").read_bytes() == b""
