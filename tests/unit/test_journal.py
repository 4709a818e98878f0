"""aggregator.journal: what was promised is there after any crash, and what is damaged is never taken for it."""

import os
import random
import resource
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import journal as module
from aggregator.journal import Journal
from aggregator.ports import BlobLost
from shared.errors import StorageError
from tests.unit.full_disk import filled, small_disk


def name(data: bytes | bytearray) -> bytes:
    """Its sha256."""
    return sha256(data).digest()


def named(*bodies: bytes) -> dict[bytes, bytes]:
    """As `append` takes them."""
    return {name(each): each for each in bodies}


def body(number: int, size: int = 1000) -> bytes:
    """The same bytes for the same number."""
    return random.Random(number).randbytes(size)


def read(journal: Journal, data: bytes) -> bool:
    """Whether these bytes are handed out; whatever else is said to be there must be called lost."""
    if name(data) not in journal:
        return False
    try:
        found = journal.read(name(data))
    except BlobLost:
        return False
    return sha256(found).digest() == name(data)


def segments(folder: Path) -> list[Path]:
    """The files."""
    return sorted(folder.glob("*.segment"))


# -- what is stored ----------------------------------------------------------------------------------------------


def test_appended_and_read(tmp_path: Path) -> None:
    """Bytes of any size come back, whole or a piece of them, in this process and in the next."""
    bodies = [b"", b"x", body(1), body(2, 300_000)]
    journal = Journal(tmp_path)
    journal.append(named(*bodies[:2]))
    journal.append(named(*bodies[2:]))
    for again in (journal, Journal(tmp_path)):
        assert [again.read(name(each)) for each in bodies] == bodies
        assert [again.size(name(each)) for each in bodies] == [0, 1, 1000, 300_000]
        assert sorted(again.names()) == sorted(map(name, bodies))
        assert again.read(name(bodies[3]), 250_000, 40_000) == bodies[3][250_000:290_000]
        assert again.read(name(bodies[3]), 290_000, 40_000) == bodies[3][290_000:]
        assert again.read(name(bodies[3]), 300_000, 1) == again.read(name(bodies[3]), 400_000, 1) == b""
    assert len(segments(tmp_path)) == 1


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer(tmp_path: Path, kind: type) -> None:
    """Whoever received bytes into a buffer need not copy them, and may use it again afterwards."""
    data = bytearray(body(1))
    journal = Journal(tmp_path)
    journal.append({name(data): kind(data)})
    data[:] = bytes(1000)
    assert journal.read(name(body(1))) == body(1)


def test_many_at_once(tmp_path: Path) -> None:
    """More pieces than the kernel takes in one call."""
    bodies = [body(each, each % 7) for each in range(2000)]
    journal = Journal(tmp_path)
    journal.append(named(*bodies))
    assert all(read(Journal(tmp_path), each) for each in bodies[:50])
    assert sorted(journal.names()) == sorted({name(each) for each in bodies})


def test_on_the_disk_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is synchronised once, when all of it is written; a new file's name was synchronised before."""
    synced: list[Any] = []
    real = os.fdatasync

    def fdatasync(file: int) -> None:
        synced.append(Path(f"/proc/self/fd/{file}").read_bytes())
        real(file)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(module, "sync_folder", lambda folder: synced.append(str(folder)))
    journal = Journal(tmp_path)
    journal.append(named(body(1), body(2)))
    assert synced[0] == str(tmp_path) and len(synced) == 2
    assert body(1) in synced[1] and body(2) in synced[1]
    journal.append(named(body(3)))
    assert len(synced) == 3 and body(3) in synced[2]


def test_stored_twice(tmp_path: Path) -> None:
    """What is there, and sound, is not written again."""
    journal = Journal(tmp_path)
    journal.append(named(body(1)))
    size = segments(tmp_path)[0].stat().st_size
    journal.append(named(body(1)))
    journal.append({})
    assert segments(tmp_path)[0].stat().st_size == size


def test_stored_again_where_it_was_damaged(tmp_path: Path) -> None:
    """Sending the same again repairs it, in the same file or in another."""
    journal = Journal(tmp_path)
    journal.append(named(body(1)))
    for again in (journal, Journal(tmp_path)):
        for path in segments(tmp_path):
            path.write_bytes(path.read_bytes().replace(body(1)[:9], bytes(9)))
        assert not read(again, body(1))
        again.append(named(body(1)))
        assert read(again, body(1)) and read(Journal(tmp_path), body(1))


def test_segments_roll(tmp_path: Path) -> None:
    """A file ends before it is too long; what is longer by itself has one of its own."""
    journal = Journal(tmp_path, 3000)
    for number in range(7):
        journal.append(named(body(number)))
    journal.append(named(body(7, 10_000)))
    journal.append(named(body(8)))
    assert [path.name for path in segments(tmp_path)] == [f"{each:08}.segment" for each in (1, 2, 3, 4, 5, 6)]
    assert all(path.stat().st_size <= 3000 for path in segments(tmp_path)[:4])
    again = Journal(tmp_path, 3000)
    assert all(read(again, body(number)) for number in (*range(7), 8)) and read(again, body(7, 10_000))
    again.append(named(body(9)))
    assert segments(tmp_path)[-1].name == "00000007.segment"


def test_a_file_in_which_nothing_is_wanted_goes(tmp_path: Path) -> None:
    """The one that is written to is emptied, the others are removed; forgetting twice is forgetting."""
    journal = Journal(tmp_path, 3000)
    for number in range(6):
        journal.append(named(body(number)))
    assert len(segments(tmp_path)) == 3
    for number in (0, 1, 0, 2, 5):
        journal.forget(name(body(number)))
    assert [path.name for path in segments(tmp_path)] == ["00000002.segment", "00000003.segment"]
    journal.forget(name(body(4)))
    assert segments(tmp_path)[1].stat().st_size < 100
    journal.append(named(body(6)))
    assert sorted(journal.names()) == sorted(map(name, (body(3), body(6))))
    assert read(journal, body(3)) and read(journal, body(6))
    # What was forgotten beside something that is wanted is there again; the service sweeps.
    assert sorted(Journal(tmp_path, 3000).names()) == sorted(map(name, (body(2), body(3), body(6))))


def test_what_is_wanted_long_does_not_keep_its_neighbours(tmp_path: Path) -> None:
    """One of a slow task between many of a fast one: the disk holds little more than what is wanted."""
    journal, most = Journal(tmp_path, 10_000), 0
    for number in range(200):
        journal.append(named(body(number, 2000)))
        if number % 8:
            journal.forget(name(body(number, 2000)))
            journal.tidy()
        most = max(most, sum(path.stat().st_size for path in segments(tmp_path)) - 2 * 2000 * (number // 8 + 1))
    assert most < 60_000
    for again in (journal, Journal(tmp_path, 10_000)):
        assert all(read(again, body(number, 2000)) for number in range(0, 200, 8))


# -- after a crash -----------------------------------------------------------------------------------------------


def test_cut_off_anywhere(tmp_path: Path) -> None:
    """Every record that is there whole is found; the torn rest is removed, and the next record is found behind it."""
    (tmp_path / "made").mkdir()
    made = Journal(tmp_path / "made")
    bodies = [body(number, 40) for number in range(3)]
    made.append(named(*bodies))
    (path,) = segments(tmp_path / "made")
    whole = path.read_bytes()
    ends = [whole.index(each) + len(each) for each in bodies]
    for length in range(len(whole) + 1):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / path.name).write_bytes(whole[:length])
        journal = Journal(folder)
        there = [end <= length for end in ends]
        assert [read(journal, each) for each in bodies] == there
        assert [each.stat().st_size for each in segments(folder)] == (
            [max(e for e in ends if e <= length)] if any(there) else []
        )
        journal.append(named(body(9)))
        assert [read(Journal(folder), each) for each in (*bodies, body(9))] == [*there, True]


def test_a_bit_flipped_anywhere(tmp_path: Path) -> None:
    """It costs the record that it is in, and no other."""
    journal = Journal(tmp_path)
    bodies = [body(number, 40) for number in range(3)]
    journal.append(named(*bodies))
    (path,) = segments(tmp_path)
    whole = path.read_bytes()
    begin = 32
    for at in range(begin, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        again = Journal(tmp_path)
        hit = (at - begin) // (64 + 40)
        assert [read(again, each) for each in bodies] == [number != hit for number in range(3)]


@given(st.binary(max_size=300))
def test_any_bytes_as_a_file(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    """A file that is none of ours, or all damage, stops nothing."""
    folder = tmp_path_factory.mktemp("journal")
    (folder / "00000001.segment").write_bytes(junk)
    (folder / "00000002.segment").write_bytes(b"fieldfare-blobs1" + bytes(16) + junk)
    (folder / "notes.segment").write_bytes(junk)
    journal = Journal(folder)
    assert journal.names() == []
    journal.append(named(body(1)))
    assert read(Journal(folder), body(1))


def test_no_record_can_hide_another(tmp_path: Path) -> None:
    """Bytes that look like a long record, in one whose header is damaged, do not swallow those behind it."""
    victim = body(1)
    hidden = module._header(bytes(16), name(b""), 500)
    journal = Journal(tmp_path)
    journal.append(named(hidden, victim))
    (path,) = segments(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(name(hidden), bytes(32)))
    assert read(Journal(tmp_path), victim)


def test_moved_by_halves(tmp_path: Path) -> None:
    """A crash while a record was moved leaves two of it, the second perhaps not whole: a sound one is found."""
    journal = Journal(tmp_path)
    journal.append(named(body(1), body(2)))
    journal.close()
    journal._write(named(body(1)))
    first, second = segments(tmp_path)
    for damaged in (first, second):
        intact = damaged.read_bytes()
        damaged.write_bytes(intact.replace(body(1), bytes(1000)))
        assert read(Journal(tmp_path), body(1))
        damaged.write_bytes(intact)
        if not second.exists():
            second.write_bytes(intact)


CHILD = """
import sys
from hashlib import sha256
from pathlib import Path
from aggregator.journal import Journal
from tests.unit.test_journal import body, named
journal, start = Journal(Path(sys.argv[1]), 20_000), int(sys.argv[2])
for number in range(start, start + 10_000):
    journal.append(named(body(number), body(number + 10**6)))
    if number % 3 == 0:
        journal.forget(sha256(body(number + 10**6)).digest())
        journal.tidy()
    print(number, flush=True)
"""


def test_killed_at_any_time(tmp_path: Path) -> None:
    """What `append` returned for is there, however often and whenever the process was killed."""
    dice = random.Random(5)
    top = Path(__file__).resolve().parents[2]
    promised: list[int] = []
    for start in range(0, 50_000, 10_000):
        command = [sys.executable, "-c", CHILD, str(tmp_path), str(start)]
        with subprocess.Popen(
            command, cwd=top, env=os.environ | {"PYTHONPATH": str(top)}, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            for _ in range(dice.randrange(1, 60)):
                promised.append(int(child.stdout.readline()))
            child.send_signal(signal.SIGKILL)
            promised += map(int, child.stdout.read().split())
        journal = Journal(tmp_path, 20_000)
        missing = [number for number in promised if not read(journal, body(number))]
        assert missing == []
        assert all(read(journal, body(number + 10**6)) for number in promised if number % 3)


# -- a disk that refuses -----------------------------------------------------------------------------------------


def test_a_full_disk(tmp_path: Path) -> None:
    """It is said that it may pass, nothing has changed, and the same works as soon as there is room."""
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        journal = Journal(disk)
        journal.append(named(body(1)))
        with filled(disk, leave=8192):
            before = [(path.name, path.read_bytes()) for path in segments(disk)]
            for _ in range(3):
                with pytest.raises(StorageError, match="No space left") as caught:
                    journal.append(named(body(2, 50_000), body(3)))
                assert caught.value.passing
                assert journal.names() == [name(body(1))] and read(journal, body(1))
                assert [(path.name, path.read_bytes()) for path in segments(disk)] == before
            assert [read(Journal(disk), each) for each in (body(1), body(3))] == [True, False]
        journal.append(named(body(2, 50_000), body(3)))
        for again in (journal, Journal(disk)):
            assert all(read(again, each) for each in (body(1), body(2, 50_000), body(3)))


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """The same where the limit is on the file, and the first record of all does not fit."""
    journal = Journal(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(StorageError) as caught:
            journal.append(named(body(1)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.passing
    assert segments(tmp_path) == [] and journal.names() == []
    journal.append(named(body(1)))
    assert read(Journal(tmp_path), body(1))


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    """That does not pass by itself."""
    (tmp_path / "blobs").mkdir()
    journal = Journal(tmp_path / "blobs")
    (tmp_path / "blobs").rmdir()
    with pytest.raises(StorageError) as caught:
        journal.append(named(body(1)))
    assert not caught.value.passing
