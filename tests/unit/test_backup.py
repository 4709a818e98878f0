"""aggregator.backup: consistent while others write, refused if a byte differs, and everything is there again."""

import fcntl
import io
import os
import random
import sqlite3
import subprocess
import sys
import tarfile
from hashlib import sha256
from pathlib import Path

import pytest
from msgspec import json

from aggregator import backup
from aggregator import config as settings
from aggregator.blobs import Blobs
from aggregator.config import AggregatorConfig, Limits, State
from aggregator.ports import BlobLost
from aggregator.store import Store
from shared.errors import RemoteProtocolError, StorageError
from tests.records import Records, linear, weights
from tests.unit.full_disk import filled, small_disk
from tests.unit.test_aggregator_store import NOW, offer, row, rows

RECORDS = Records()
MESSAGE = RECORDS.message()
LATER = NOW + 1000


def configured(folder: Path, keep: int = 3) -> AggregatorConfig:
    """An aggregator with this state directory."""
    broker = settings.Broker(host="localhost")
    return AggregatorConfig(broker=broker, state=State(directory=folder), limits=Limits(keep_releases=keep))


def begun(folder: Path) -> tuple[AggregatorConfig, Store, Blobs]:
    """A task with six releases, a round that is over, an open one with an update, its body and its key."""
    config = configured(folder)
    folder.mkdir(parents=True, exist_ok=True)
    store, blobs = Store(config.database), Blobs(folder / "blobs")
    graphs = (blobs.put(linear("train")), blobs.put(linear("eval")))
    body = sha256(b"body of a").digest()
    blobs.put_all({body: b"body of a"})
    with store.transaction():
        store.adopt("points", 1, MESSAGE, graphs)
        for number in range(6):
            blob = weights(float(number))
            signed = MESSAGE.release if number == 0 else RECORDS.release(MESSAGE.manifest, number, blob)
            store.add_release("points", 1, number, signed, blobs.put(blob), NOW + number)
        store.open_round("points", 1, 1, offer(), NOW)
        store.contribute([row("a")])
        store.end_round("points", 1, 1, "released", NOW)
        store.open_round("points", 1, 2, offer(2), NOW)
        store.contribute([row("a", 1, origin_round=2, collected_in=2, body=body)])
    (folder / "keys").mkdir(exist_ok=True)
    (folder / "keys" / "points.1.2").write_bytes(b"private key")
    return config, store, blobs


def made(folder: Path) -> Path:
    """A backup of such a state."""
    config, store, blobs = begun(folder / "state")
    store.close()
    blobs.close()
    backup.make(config, folder / "made.tar", NOW)
    return folder / "made.tar"


def test_out_and_back(tmp_path: Path) -> None:
    """Every row is there again, and the blobs that are needed; keys and bodies never left; the open round is over."""
    config, store, blobs = begun(tmp_path / "state")
    found = backup.make(config, tmp_path / "backup.tar", NOW)
    before = rows(config.database)
    store.close()
    blobs.close()
    archive = (tmp_path / "backup.tar").read_bytes()
    assert b"private key" not in archive and b"body of a" not in archive
    assert (found.size, found.left_out, found.manifest.tasks) == (len(archive), [], ["points"])
    assert (tmp_path / "backup.tar").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.tar", "state"]
    with tarfile.open(tmp_path / "backup.tar") as tar:
        assert len(tar.getnames()) == 1 + 2 + 3 + 1  # database, graphs, weights to go back to, manifest

    there = configured(tmp_path / "elsewhere" / "state")
    assert backup.restore(there, tmp_path / "backup.tar", LATER) == found.manifest
    after = rows(there.database)
    assert after.pop("tasks") == [("points", "active", 1)] and before.pop("tasks") == [("points", "active", 0)]
    ended = [
        each[:3] + ("superseded",) + each[4:7] + (LATER,) if each[3] == "open" else each for each in before["rounds"]
    ]
    assert after.pop("rounds") == ended != before.pop("rounds")
    assert after == before
    again, blobs = Store(there.database), Blobs(there.state.directory / "blobs")
    (task,) = again.tasks()
    assert task.restored and task.round is not None and (task.round.number, task.round.state) == (2, "superseded")
    assert blobs.get(again.model("points", 1)[2]) == weights(5.0)
    assert sorted(blobs.names()) == sorted({*again.model("points", 1), *again.weights_in_use(3)})
    assert sorted(path.name for path in there.state.directory.iterdir() if "aggregator.db" not in path.name) == [
        "blobs",
        "lock",
    ]
    again.close()


WRITER = """
import sys
from pathlib import Path
from aggregator.blobs import Blobs
from aggregator.store import Store
from tests.records import weights
from tests.unit.test_aggregator_store import MESSAGE, NOW, row
store, blobs = Store(Path(sys.argv[1]) / "aggregator.db"), Blobs(Path(sys.argv[1]) / "blobs")
for number in range(10, 100_000):
    name = blobs.put(weights(float(number)))
    with store.transaction():
        store.add_release("points", 1, number, MESSAGE.release, name, NOW)
        store.contribute([row(f"x-{number}", number), row(f"y-{number}", number)])
    for spent in store.weights_spent("points", 8):
        blobs.delete(spent)
    print(number, flush=True)
"""


def test_while_the_daemon_writes(tmp_path: Path) -> None:
    """Each backup is of one instant: whole transactions, no older than when it began, with the weights they name."""
    config, store, blobs = begun(tmp_path / "state")
    store.close()
    blobs.close()
    top = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", WRITER, str(tmp_path / "state")]
    environ = os.environ | {"PYTHONPATH": str(top)}
    with subprocess.Popen(command, cwd=top, env=environ, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for number in range(6):
            least = int(child.stdout.readline())
            backup.make(config, tmp_path / "backup.tar", NOW)
            there = configured(tmp_path / str(number))
            backup.restore(there, tmp_path / "backup.tar", LATER)
            again, found = Store(there.database, read_only=True), Blobs(there.state.directory / "blobs")
            devices = {each.device for each in again.contributions("points", 1, 1)} - {"a"}
            newest = max(int(each[2:]) for each in devices)
            assert newest >= least
            assert devices == {f"{letter}-{each}" for letter in "xy" for each in range(10, newest + 1)}
            assert found.get(again.model("points", 1)[2]) == weights(float(newest))
            again.close()
        child.kill()


def test_any_flipped_bit_is_refused(tmp_path: Path) -> None:
    """Wherever it is, in a header, a member, its padding or the end; and nothing is restored then."""
    archive = made(tmp_path)
    whole, dice = archive.read_bytes(), random.Random(3)
    begins = [at + more for at in range(0, len(whole), 512) for more in (0, 511)]
    manifest = whole.index(b'"made":') + 7
    flips = [(at, 1 << dice.randrange(8)) for at in (*begins, *dice.sample(range(len(whole)), 300))]
    for at, bit in [*flips, *((at, 1) for at in range(manifest, manifest + 10))]:
        with pytest.raises(RemoteProtocolError):
            backup.verify(io_file(tmp_path, whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :]))
    archive.write_bytes(whole.replace(b"aggregator.db", b"aggregator.dB", 1))
    there = configured(tmp_path / "there")
    with pytest.raises(RemoteProtocolError):
        backup.restore(there, archive, LATER)
    assert [path.name for path in there.state.directory.iterdir()] == ["lock"]


def io_file(folder: Path, data: bytes) -> io.BufferedReader:
    """An open file with these bytes."""
    (folder / "spoilt").write_bytes(data)
    return (folder / "spoilt").open("rb")


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 20_000, -1, -512, -1024, -1025])
def test_any_other_length_is_refused(tmp_path: Path, length: int) -> None:
    """Cut off, or with something behind its end."""
    whole = made(tmp_path).read_bytes()
    for data in (whole[:length], whole + bytes(abs(length) or 1)):
        with pytest.raises(RemoteProtocolError):
            backup.verify(io_file(tmp_path, data))


def packed(files: list[tuple[str, bytes]], **changes: object) -> bytes:
    """An archive with a manifest that fits, whatever its members are called."""
    listed = {name: {"size": len(data), "sha256": sha256(data).hexdigest()} for name, data in files}
    told = {"format": 1, "program": "0", "schema": 2, "made": 0, "tasks": [], "members": listed} | changes
    manifest = json.encode(told)
    files = [*files, (f"manifest-{sha256(manifest).hexdigest()}.json", manifest)]
    return b"".join(backup._header(n, len(d)) + d + backup._padding(len(d)) for n, d in files) + bytes(1024)


GOOD = ("aggregator.db", b"x" * 600)
BLOB = (f"blobs/{sha256(b'w').hexdigest()}", b"w")
HOSTILE: dict[str, bytes] = {
    "a way out": packed([GOOD, ("../../etc/passwd", b"root")]),
    "an absolute name": packed([GOOD, ("/etc/passwd", b"root")]),
    "a blob's name that is a way out": packed([GOOD, (f"blobs/../{'0' * 61}", b"w")]),
    "another file": packed([GOOD, ("keys/points.1.1", b"key")]),
    "a blob under another's name": packed([GOOD, (BLOB[0], b"v")]),
    "the same name twice": packed([GOOD, BLOB, BLOB]),
    "no database": packed([BLOB]),
    "one member less than is told": packed([GOOD], members={GOOD[0]: {"size": 600, "sha256": "0" * 64}}),
    "a member that is not told of": packed([GOOD, BLOB], members={}),
    "another format": packed([GOOD], format=2),
    "an unknown field": packed([GOOD], more=1),
    "a size that lies": packed([GOOD], members={GOOD[0]: {"size": 1, "sha256": sha256(GOOD[1]).hexdigest()}}),
    "a member beyond the end": backup._header("aggregator.db", 1 << 40) + bytes(2048),
    "a manifest without an end": backup._header(f"manifest-{'0' * 64}.json", 1 << 30) + bytes(2048),
    "junk": random.Random(1).randbytes(5000),
    "zeros": bytes(5120),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives(tmp_path: Path, case: str) -> None:
    """Whatever an archive claims, nothing is written but under a name that we give."""
    (tmp_path / "hostile.tar").write_bytes(HOSTILE[case])
    with pytest.raises(RemoteProtocolError):
        backup.restore(configured(tmp_path / "state"), tmp_path / "hostile.tar", LATER)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["hostile.tar", "lock", "state"]


def test_a_link_in_an_archive(tmp_path: Path) -> None:
    """Only plain files are members."""
    archive = made(tmp_path)
    info = tarfile.TarInfo("aggregator.db")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    archive.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + archive.read_bytes())
    with pytest.raises(RemoteProtocolError):
        backup.restore(configured(tmp_path / "there"), archive, LATER)


def test_a_database_that_is_none(tmp_path: Path) -> None:
    """An archive can fit its manifest and still hold junk: what lies in the state directory stays."""
    config, store, blobs = begun(tmp_path / "state")
    store.close()
    blobs.close()
    before = rows(config.database)
    (tmp_path / "junk.tar").write_bytes(packed([GOOD, BLOB]))
    with pytest.raises(Exception, match="not a database"):
        backup.restore(config, tmp_path / "junk.tar", LATER, force=True)
    assert rows(config.database) == before
    assert not (tmp_path / "state" / ".restore").exists()


def test_not_over_a_database(tmp_path: Path) -> None:
    """One that lies there is set aside when that is wanted, so that it can still be opened, and never replaced."""
    archive, config = made(tmp_path), configured(tmp_path / "state")
    store = Store(config.database)
    with store.transaction():
        store.set_task_state("points", "paused")
    before = rows(config.database)
    with pytest.raises(FileExistsError, match="--force"):
        backup.restore(config, archive, LATER)
    # As after a kill: its log is not in the file yet.
    for name in ("aggregator.db", "aggregator.db-wal"):
        (tmp_path / name).write_bytes((tmp_path / "state" / name).read_bytes())
    store.close()
    for name in ("aggregator.db", "aggregator.db-wal"):
        (tmp_path / "state" / name).write_bytes((tmp_path / name).read_bytes())
    for number in (1, 2):
        backup.restore(config, archive, LATER, force=True)
        store = Store(config.database)
        assert (store.task_state("points"), store.tasks()[0].restored) == ("active", True)
        store.close()
        assert (tmp_path / "state" / f"aggregator.db.replaced-{number}").exists()
    assert rows(tmp_path / "state" / "aggregator.db.replaced-1") == before


def test_not_under_a_running_aggregator(tmp_path: Path) -> None:
    """The lock is the daemon's, and restoring holds it too."""
    archive, config = made(tmp_path), configured(tmp_path / "state")
    with config.lock_file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="stop it first"):
            backup.restore(config, archive, LATER, force=True)
    backup.restore(config, archive, LATER, force=True)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    """Without the newest weights or a graph it is no backup; older weights are left out, and it is said."""
    config, store, _ = begun(tmp_path / "state")
    output = tmp_path / "backup.tar"
    old = sha256(weights(4.0)).hexdigest()
    (tmp_path / "state" / "blobs" / old).write_bytes(b"damaged")
    assert backup.make(config, output, NOW).left_out == [old]
    with output.open("rb") as file:
        assert len(backup.verify(file)[0].members) == 1 + 2 + 2
    (tmp_path / "state" / "blobs" / old).unlink()
    assert backup.make(config, output, NOW).left_out == [old]
    kept = output.read_bytes()
    for name in store.model("points", 1):
        path = tmp_path / "state" / "blobs" / name.hex()
        data = path.read_bytes()
        path.write_bytes(data[:-1] + b"?")
        with pytest.raises(BlobLost):
            backup.make(config, output, NOW)
        path.write_bytes(data)
    assert output.read_bytes() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.tar", "state"]
    store.close()


def test_no_room(tmp_path: Path) -> None:
    """Half a backup is none, and half a restoring changes nothing; both say that the disk is full."""
    archive = made(tmp_path)
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        config, store, blobs = begun(disk / "state")
        before = rows(config.database)
        store.close()
        blobs.close()
        with filled(disk, leave=65536):
            with pytest.raises(StorageError) as caught:
                backup.make(config, disk / "backup.tar", NOW)
            assert caught.value.passing
            assert sorted(path.name for path in disk.iterdir()) == ["ballast", "state"]
            with pytest.raises(StorageError) as caught:
                backup.restore(config, archive, LATER, force=True)
            assert caught.value.passing
        assert rows(config.database) == before


def test_what_root_restores_is_the_daemons(tmp_path: Path) -> None:
    """The service's user must be able to write it, whoever ran the command."""
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    archive = made(tmp_path)
    (tmp_path / "there").mkdir()
    os.chown(tmp_path / "there", 12345, 12346)
    backup.restore(configured(tmp_path / "there"), archive, LATER)
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in (tmp_path / "there").rglob("*")}
    assert owners == {(12345, 12346)}


def test_what_its_database_names_and_it_has_not(tmp_path: Path) -> None:
    """Such an archive would make an aggregator that cannot publish; here it is also of an older schema."""
    old = sqlite3.connect(":memory:")
    old.executescript((Path(__file__).parents[1] / "vectors" / "schema-1.sql").read_text())
    archive = tmp_path / "old.tar"
    archive.write_bytes(packed([("aggregator.db", old.serialize()), BLOB]))
    with pytest.raises(RemoteProtocolError, match="is not in it"):
        backup.restore(configured(tmp_path / "state"), archive, LATER)
    assert not (tmp_path / "state" / "aggregator.db").exists()
