"""What the aggregator remembers: rows that become durable together, bytes that are whole, and a count that is one."""

import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from aggregator.store import SCHEMA_VERSION, Blobs, Contribution, Store
from shared import wire
from shared.errors import ConfigError, LocalProtocolError
from shared.messages import OfferState, ReleaseMessage, Signed
from tests.records import Records

RECORDS = Records()
MESSAGE = RECORDS.message()
GRAPHS = (b"t" * 32, b"e" * 32)
NOW = 1_800_000_000.5


def row(device: str, seq: int = 1, **changes: object) -> Contribution:
    """One accepted update of a device."""
    made = Contribution(
        task="points",
        manifest_version=1,
        origin_round=1,
        device=device,
        collected_in=1,
        head_digest=sha256(f"{device} {seq}".encode()).digest(),
        seq=seq,
        weight=1.5,
        examples=40,
        holdout=4,
        metrics={"loss": 0.1 + 0.2},
        head=b"head of " + device.encode(),
        body=sha256(device.encode()).digest(),
        at=NOW,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def offer(number: int = 1, sequence: int = 0, state: OfferState = OfferState.OPEN) -> Signed:
    """A signed offer of the task."""
    return RECORDS.sign_offer(RECORDS.offer(MESSAGE, number, sequence=sequence, state=state))


def begun(path: Path) -> Store:
    """A store with a task, its first release and an open round."""
    store = Store(path)
    with store.transaction():
        adopt(store)
        store.open_round("points", 1, 1, offer(), NOW)
    return store


def adopt(store: Store, message: ReleaseMessage = MESSAGE, version: int = 1) -> None:
    """A manifest with its release 0."""
    store.adopt("points", version, message, GRAPHS)
    store.add_release("points", version, 0, message.release, b"w" * 32, NOW)


def rows(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """Every row, as another program sees it."""
    with sqlite3.connect(path) as database:
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type='table'")]
        return {name: sorted(database.execute(f'SELECT * FROM "{name}"'), key=repr) for name in names}


# -- opening -----------------------------------------------------------------------------------------------------


def test_a_new_database(tmp_path: Path) -> None:
    """It is made with its schema's version, and nothing is in it."""
    store = Store(tmp_path / "db")
    assert store.tasks() == []
    store.close()
    assert rows(tmp_path / "db")["schema_version"] == [(SCHEMA_VERSION,)]


def test_a_newer_schema(tmp_path: Path) -> None:
    """What a later program wrote is left alone, and the error says what to do."""
    Store(tmp_path / "db").close()
    with sqlite3.connect(tmp_path / "db") as database:
        database.execute("UPDATE schema_version SET version = ?", (SCHEMA_VERSION + 1,))
    before = rows(tmp_path / "db")
    for read_only in (False, True):
        with pytest.raises(ConfigError, match=f"has schema {SCHEMA_VERSION + 1}, this program knows {SCHEMA_VERSION}"):
            Store(tmp_path / "db", read_only=read_only)
    assert rows(tmp_path / "db") == before


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("content", [b"Dear operator", b"\0" * 5000, b"SQLite format 3\0" + b"x" * 5000])
def test_not_a_database(tmp_path: Path, content: bytes, read_only: bool) -> None:
    """A file that is something else is refused by name, and not written to."""
    (tmp_path / "db").write_bytes(content)
    with pytest.raises(ConfigError, match="not a usable database"):
        Store(tmp_path / "db", read_only=read_only)
    assert (tmp_path / "db").read_bytes() == content


def test_a_database_of_somebody_else(tmp_path: Path) -> None:
    """Read-only, a database without our tables is refused."""
    with sqlite3.connect(tmp_path / "db") as database:
        database.execute("CREATE TABLE songs (name TEXT)")
    with pytest.raises(ConfigError, match="not a usable database"):
        Store(tmp_path / "db", read_only=True)


def test_no_database_to_read(tmp_path: Path) -> None:
    """Whoever only wants to read creates nothing."""
    with pytest.raises(ConfigError, match="no database here"):
        Store(tmp_path / "db", read_only=True)
    assert list(tmp_path.iterdir()) == []


def test_a_path_with_odd_letters(tmp_path: Path) -> None:
    """A folder may be called anything that a file system takes."""
    path = tmp_path / "a b" / "50%25#1"
    path.mkdir(parents=True)
    begun(path / "db").close()
    assert (path / "db").exists()


def test_read_only(tmp_path: Path) -> None:
    """A reader sees everything and can change nothing, also while the aggregator has it open."""
    writer = begun(tmp_path / "db")
    reader = Store(tmp_path / "db", read_only=True)
    assert reader.tasks() == writer.tasks()
    with pytest.raises(LocalProtocolError), reader.transaction():
        reader.contribute([row("a")])
    with writer.transaction():
        writer.contribute([row("b")])
    assert [each.device for each in reader.contributions("points", 1, 1)] == ["b"]
    reader.close()
    writer.close()


def test_opened_again(tmp_path: Path) -> None:
    """What was committed is what the next start finds."""
    store = begun(tmp_path / "db")
    with store.transaction():
        store.contribute([row("b", 2), row("a", 1)])
        store.revise_round("points", 1, 1, "open", offer(sequence=1), 2)
    before = store.tasks()
    store.close()
    again = Store(tmp_path / "db")
    assert again.tasks() == before
    (task,) = before
    assert (task.name, task.manifest_version, task.manifest, task.release) == (
        "points",
        1,
        MESSAGE.manifest,
        MESSAGE.release,
    )
    assert task.round is not None
    assert (task.round.number, task.round.state, task.round.extensions) == (1, "open", 2)
    assert (task.round.offer, task.round.opened) == (offer(sequence=1), NOW)
    assert task.contributions == (row("a", 1), row("b", 2))
    again.close()


# -- transactions ------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Something that is no fault of the database."""


def test_all_or_nothing(tmp_path: Path) -> None:
    """Whatever ends a transaction early, nothing of it remains, and the next one works."""
    store = begun(tmp_path / "db")
    before = rows(tmp_path / "db")
    with pytest.raises(Interrupted), store.transaction():
        assert store.contribute([row("a")]) == {row("a").head_digest}
        store.end_round("points", 1, 1, "released", NOW)
        raise Interrupted
    with pytest.raises(LocalProtocolError, match="the database failed"), store.transaction():
        store.contribute([row("a")])
        store.add_release("points", 1, 0, MESSAGE.release, b"x" * 32, NOW)
    assert rows(tmp_path / "db") == before
    with store.transaction():
        assert store.contribute([row("a")]) == {row("a").head_digest}
    assert store.contributions("points", 1, 1) == [row("a")]
    store.close()


def test_the_same_number_twice(tmp_path: Path) -> None:
    """A release's and a round's number is given once; again is our own mistake, and the first stays."""
    store = begun(tmp_path / "db")
    with pytest.raises(LocalProtocolError), store.transaction():
        store.open_round("points", 1, 1, offer(sequence=9), NOW)
    with pytest.raises(LocalProtocolError), store.transaction():
        store.add_release("points", 1, 0, MESSAGE.release, b"x" * 32, NOW)
    assert store.model("points", 1) == (*GRAPHS, b"w" * 32)
    store.close()


def test_killed_inside_a_transaction(tmp_path: Path) -> None:
    """A process that dies before the commit leaves the last committed state."""
    begun(tmp_path / "db").close()
    before = rows(tmp_path / "db")
    code = (
        "import os, sys; from pathlib import Path; from tests.unit.test_aggregator_store import Store, row\n"
        f"store = Store(Path({str(tmp_path / 'db')!r}))\n"
        "with store.transaction():\n"
        "    store.contribute([row('a'), row('b', 2)])\n"
        "    os._exit(9)\n"
    )
    top = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=top, env=os.environ | {"PYTHONPATH": str(top)}, timeout=60)
    assert done.returncode == 9
    store = Store(tmp_path / "db")
    assert rows(tmp_path / "db") == before
    assert store.tasks()[0].contributions == ()
    store.close()


# -- contributions -----------------------------------------------------------------------------------------------


def test_only_what_is_returned_counts(tmp_path: Path) -> None:
    """A device is in a round once: another head of it, or the same again, is not returned and changes nothing."""
    store = begun(tmp_path / "db")
    with store.transaction():
        assert store.contribute([row("a", 1), row("b", 2)]) == {row("a", 1).head_digest, row("b", 2).head_digest}
    with store.transaction():
        again = store.contribute([row("a", 1), row("b", 3), row("c", 3)])
    assert again == {row("c", 3).head_digest}
    assert store.contributions("points", 1, 1) == [row("a", 1), row("b", 2), row("c", 3)]
    with store.transaction():
        assert store.contribute([]) == set()
        assert store.contribute([row("d", 4), row("d", 5)]) == {row("d", 4).head_digest}
    store.close()


def test_many_at_once(tmp_path: Path) -> None:
    """A full batch of a large fleet is one statement."""
    store = begun(tmp_path / "db")
    many = [row(f"device-{number}", number) for number in range(1500)]
    with store.transaction():
        assert len(store.contribute(many)) == 1500
    assert store.contributions("points", 1, 1) == many
    store.close()


def test_in_the_order_of_the_fold(tmp_path: Path) -> None:
    """By seq, whatever the order of insertion or of names."""
    store = begun(tmp_path / "db")
    with store.transaction():
        store.contribute([row("z", 2), row("a", 10), row("m", 1)])
    assert [each.device for each in store.contributions("points", 1, 1)] == ["m", "z", "a"]
    store.close()


def test_recall(tmp_path: Path) -> None:
    """What a device gave to one round of one manifest, long after the round; nothing for any other."""
    store = begun(tmp_path / "db")
    with store.transaction():
        store.contribute([row("a", 1), row("a", 1, origin_round=2, collected_in=2), row("a", 7, manifest_version=2)])
        store.end_round("points", 1, 1, "released", NOW + 1)
    assert store.recall("points", 1, 1, "a") == row("a", 1)
    assert store.recall("points", 2, 1, "a") == row("a", 7, manifest_version=2)
    for task, version, number, device in [("points", 1, 3, "a"), ("points", 1, 1, "b"), ("lines", 1, 1, "a")]:
        assert store.recall(task, version, number, device) is None
    store.close()


# -- tasks -------------------------------------------------------------------------------------------------------


def test_the_newest_of_a_task(tmp_path: Path) -> None:
    """The highest manifest with its own releases and rounds; older ones stay on record."""
    store = begun(tmp_path / "db")
    newer = RECORDS.message(RECORDS.manifest(version=2), value=2.0)
    with store.transaction():
        store.end_round("points", 1, 1, "superseded", NOW)
        adopt(store, newer, 2)
    (task,) = store.tasks()
    assert (task.manifest_version, task.manifest, task.release, task.round) == (2, newer.manifest, newer.release, None)
    signed = RECORDS.release(newer.manifest, 1)
    with store.transaction():
        store.open_round("points", 2, 1, offer(), NOW)
        store.add_release("points", 2, 1, signed, b"v" * 32, NOW)
        store.end_round("points", 2, 1, "released", NOW)
        store.open_round("points", 2, 2, offer(2), NOW)
        store.open_round("points", 2, 10, offer(10), NOW)
    (task,) = store.tasks()
    assert task.release == signed
    assert task.round is not None and (task.round.number, task.round.state) == (10, "open")
    assert store.model("points", 2)[2] == b"v" * 32
    assert store.weights_in_use() == {b"w" * 32, b"v" * 32}
    store.close()


def test_adopted_twice(tmp_path: Path) -> None:
    """The same manifest again changes nothing."""
    store = begun(tmp_path / "db")
    before = store.tasks()
    with store.transaction():
        store.adopt("points", 1, MESSAGE, (b"x" * 32, b"y" * 32))
    assert store.tasks() == before
    assert store.model("points", 1)[:2] == GRAPHS
    store.close()


def test_reading_inside_a_transaction(tmp_path: Path) -> None:
    """A question in the middle sees what was written so far and does not end the transaction."""
    store = begun(tmp_path / "db")
    with store.transaction():
        store.contribute([row("a")])
        assert store.recall("points", 1, 1, "a") == row("a")
        assert store.tasks()[0].contributions == (row("a"),)
        store.contribute([row("b", 2)])
    assert len(store.contributions("points", 1, 1)) == 2
    store.close()


def test_a_manifest_without_a_release(tmp_path: Path) -> None:
    """No step of ours writes that; the start says so and does not guess."""
    store = Store(tmp_path / "db")
    with store.transaction():
        store.adopt("points", 1, MESSAGE, GRAPHS)
    with pytest.raises(LocalProtocolError, match="without a release"):
        store.tasks()
    store.close()


def test_signed_records_come_back_byte_for_byte(tmp_path: Path) -> None:
    """What was signed is published again after a restart, so it must be the same bytes."""
    store = begun(tmp_path / "db")
    store.close()
    again = Store(tmp_path / "db")
    (task,) = again.tasks()
    assert wire.pack(task.manifest) == wire.pack(MESSAGE.manifest)
    assert wire.pack(task.release) == wire.pack(MESSAGE.release)
    assert task.round is not None and wire.pack(task.round.offer) == wire.pack(offer())
    again.close()


# -- blobs -------------------------------------------------------------------------------------------------------


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
