"""What the aggregator remembers: rows that become durable together, bytes that are whole, and a count that is one."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import sqlalchemy as sa

from aggregator import sqlite
from aggregator import store as store_module
from aggregator.ports import Contribution
from aggregator.store import REMEMBERED, SCHEMA_VERSION, Store
from shared import wire
from shared.errors import ConfigError, LocalProtocolError, StorageError
from shared.messages import OfferState, ReleaseMessage, Signed
from tests.records import Records
from tests.unit.full_disk import filled, small_disk

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
    with closing(sqlite3.connect(path)) as database:  # at once: the last to close it moves the log into the file
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
    with pytest.raises(ConfigError, match=r"db: is damaged \(file is not a database\)"):
        Store(tmp_path / "db", read_only=read_only)
    assert (tmp_path / "db").read_bytes() == content


@pytest.mark.parametrize("read_only", [False, True])
def test_a_database_of_somebody_else(tmp_path: Path, read_only: bool) -> None:
    """A database without our tables is refused, and gets none."""
    with sqlite3.connect(tmp_path / "db") as database:
        database.execute("CREATE TABLE songs (name TEXT)")
    with pytest.raises(ConfigError, match="not a usable database"):
        Store(tmp_path / "db", read_only=read_only)
    assert rows(tmp_path / "db") == {"songs": []}


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
    with pytest.raises(StorageError, match="readonly") as caught, reader.transaction():
        reader.contribute([row("a")])
    assert not caught.value.passing
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
    for each in (row("a", 1), row("a", 7, manifest_version=2)):
        assert store.recall_head("points", 1, "a", each.head_digest) == each
    for number, device, head in [(3, "a", row("a", 1).head_digest), (1, "b", row("a", 1).head_digest), (1, "a", b"")]:
        assert store.recall_head("points", number, device, head) is None
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
    assert store.weights_in_use(2) == {b"w" * 32, b"v" * 32}
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


# -- what version 2 brought ----------------------------------------------------------------------------------------


def test_a_rejected_update_takes_the_place_of_its_device(tmp_path: Path) -> None:
    """It is remembered with its reason, counts for nothing, and no other update of the device comes after it."""
    store = begun(tmp_path / "db")
    spoilt = row("a", 0, outcome="rejected", reason="norm", weight=0.0, examples=0, holdout=0, metrics={}, body=b"")
    with store.transaction():
        assert store.contribute([spoilt, row("b", 1)]) == {spoilt.head_digest, row("b", 1).head_digest}
        assert store.contribute([row("a", 2)]) == set()
    assert store.contributions("points", 1, 1) == [row("b", 1)]
    assert store.recall("points", 1, 1, "a") == spoilt
    (task,) = store.tasks()
    assert (task.contributions, task.rejected) == ((row("b", 1),), (spoilt,))
    store.close()


def test_what_the_operator_wants(tmp_path: Path) -> None:
    """It is durable and of one task; a new one is active, and a new manifest changes nothing about it."""
    store = begun(tmp_path / "db")
    assert (store.tasks()[0].state, store.tasks()[0].restored) == ("active", False)
    with store.transaction():
        store.set_task_state("points", "paused")
        store.set_restored("points", True)
        adopt(store, RECORDS.message(RECORDS.manifest(version=2)), 2)
    store.close()
    store = Store(tmp_path / "db")
    assert (store.tasks()[0].state, store.tasks()[0].restored) == ("paused", True)
    assert (store.task_state("points"), store.task_state("lines")) == ("paused", "active")
    for name, state in (("lines", "paused"), ("points", "asleep")):
        with pytest.raises(LocalProtocolError), store.transaction():
            store.set_task_state(name, state)  # type: ignore[arg-type]
    store.close()


def test_a_round_ends_in_one_of_the_ways(tmp_path: Path) -> None:
    """Any other word is our own mistake: nobody could continue from it."""
    store = begun(tmp_path / "db")
    for how in ("released", "rejected_by_gate", "superseded", "stopped", "finished"):
        with store.transaction():
            store.end_round("points", 1, 1, how, NOW)
        assert (found := store.tasks()[0].round) is not None and found.state == how
    for change in (
        lambda: store.end_round("points", 1, 1, "open", NOW),
        lambda: store.revise_round("points", 1, 1, "over", offer(), 0),
    ):
        with pytest.raises(LocalProtocolError), store.transaction():
            change()
    store.close()


def test_releases_are_replaced_and_withdrawn(tmp_path: Path) -> None:
    """Each is replaced once, when the next one of its task came; until it is withdrawn it is one of the retained."""
    store = begun(tmp_path / "db")
    newer = RECORDS.message(RECORDS.manifest(version=2))
    first, second = RECORDS.release(MESSAGE.manifest, 1), RECORDS.release(MESSAGE.manifest, 7, restores=b"r" * 32)
    with store.transaction():
        store.add_release("points", 1, 1, first, b"a" * 32, NOW + 10)
        store.add_release("points", 1, 7, second, b"b" * 32, NOW + 20, restores=0)
        store.adopt("points", 2, newer, GRAPHS)
        store.add_release("points", 2, 0, newer.release, b"c" * 32, NOW + 30)
        store.adopt("lines", 1, newer, GRAPHS)
        store.add_release("lines", 1, 0, newer.release, b"d" * 32, NOW + 40)
        store.mark_withdrawn("points", 1, 1, NOW + 50)
    told = [(r.manifest_version, r.number, r.weights[:1], r.replaced_at, r.restores) for r in store.retained("points")]
    begin = int(NOW)
    assert told == [(2, 0, b"c", None, None), (1, 7, b"b", begin + 30, 0), (1, 0, b"w", begin + 10, None)]
    gone = store.release("points", 1, 1)
    assert gone is not None and (gone.signed, gone.replaced_at, gone.withdrawn_at) == (first, begin + 20, begin + 50)
    assert store.release("points", 1, 2) is None
    assert [each.replaced_at for each in store.retained("lines")] == [None]
    store.close()


def test_withdrawn_releases_are_forgotten(tmp_path: Path) -> None:
    """Beyond the newest few, of whatever manifest; what is retained stays, and other tasks lose nothing."""
    store = begun(tmp_path / "db")
    with store.transaction():
        for number in range(1, 9):
            store.add_release("points", 1, number, MESSAGE.release, bytes([number]) * 32, NOW)
        adopt(store, RECORDS.message(RECORDS.manifest(version=2)), 2)
        store.adopt("lines", 1, MESSAGE, GRAPHS)
        for number in range(3):
            store.add_release("lines", 1, number, MESSAGE.release, bytes([number]) * 32, NOW)
        store.mark_withdrawn("lines", 1, 0, NOW)
        for number in (0, 1, 2, 4, 5, 7, 8):
            store.mark_withdrawn("points", 1, number, NOW)
        assert store.forget_releases("points", 11) == 0
        assert store.forget_releases("points", 3) == 5
        assert store.forget_releases("points", 3) == 0
    assert [(row[1], row[2]) for row in rows(tmp_path / "db")["releases"] if row[0] == "points"] == [
        (1, 3),
        (1, 6),
        (1, 7),
        (1, 8),
        (2, 0),
    ]
    assert len(store.releases("lines", 1, 9)) == 3
    store.close()


def test_weights_for_going_back(tmp_path: Path) -> None:
    """The newest of the newest manifest are kept, of each task; what fell out is named while it is fresh."""
    store = begun(tmp_path / "db")
    with store.transaction():
        for number in range(1, 9):
            store.add_release("points", 1, number, MESSAGE.release, bytes([number]) * 32, NOW)
        store.adopt("lines", 1, MESSAGE, GRAPHS)
        store.add_release("lines", 1, 0, MESSAGE.release, bytes([4]) * 32, NOW)
    assert {name[0] for name in store.weights_in_use(3)} == {8, 7, 6, 4}
    assert {name[0] for name in store.weights_spent("points", 3)} == {5, 3}  # 4 is in use by the other task
    with store.transaction():
        adopt(store, RECORDS.message(RECORDS.manifest(version=2)), 2)
    assert {name[:1] for name in store.weights_in_use(3)} == {b"w", bytes([4])}
    assert {name[0] for name in store.weights_spent("points", 3)} == {8, 7, 6, 5}
    store.close()


def test_rows_outlive_their_round_by_400_days(tmp_path: Path) -> None:
    """Then they go, a portion at a time; what is younger, what is open and the newest number stay."""
    store = begun(tmp_path / "db")
    with store.transaction():
        store.contribute([row(f"device-{number}", number) for number in range(7)])
        store.end_round("points", 1, 1, "released", NOW)
        for number, ended in ((2, NOW + 1), (3, NOW + 2), (4, None)):
            store.open_round("points", 1, number, offer(number), NOW)
            store.contribute([row("a", 1, origin_round=number, collected_in=number)])
            if ended is not None:
                store.end_round("points", 1, number, "released", ended)
    with store.transaction():
        assert store.prune(NOW + REMEMBERED) == 0
        removed = [store.prune(NOW + 1.5 + REMEMBERED, most=4) for _ in range(4)]
    assert removed == [4, 4, 2, 0]
    assert store.recall("points", 1, 2, "a") is None
    assert [store.recall("points", 1, number, "a") is not None for number in (3, 4)] == [True, True]
    assert [number for _, _, number, *_ in rows(tmp_path / "db")["rounds"]] == [3, 4]
    with store.transaction():
        store.end_round("points", 1, 4, "released", NOW)
        assert store.prune(NOW + 10 * REMEMBERED) == 3
    assert (found := store.tasks()[0].round) is not None and found.number == 4
    store.close()


# -- migration -----------------------------------------------------------------------------------------------------

FROZEN = Path(__file__).parents[1] / "vectors" / "schema-1.sql"


def version_1(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """A database as version 1 left it, and its rows."""
    with sqlite3.connect(path) as database:
        database.executescript(FROZEN.read_text())
    return rows(path)


def test_version_1_is_moved_over(tmp_path: Path) -> None:
    """Every row is kept as it was, in a database that has the form of a new one; a copy of the old one lies beside."""
    path = tmp_path / "db"
    before = version_1(path)
    store = Store(path)
    tasks = store.tasks()
    spent = store.weights_spent("points", 10)
    assert [(t.name, t.manifest_version, t.state, t.restored) for t in tasks] == [
        ("lines", 1, "active", False),
        ("points", 2, "active", False),
    ]
    assert [(t.round and (t.round.number, t.round.state), len(t.contributions)) for t in tasks] == [
        ((1, "closing"), 1),
        ((2, "open"), 2),
    ]
    assert [(each.number, each.replaced_at) for each in store.retained("points")] == [(1, None)]
    assert len(store.weights_in_use(10)) == 3 and len(spent) == 2
    store.close()
    after = rows(path)
    assert after.pop("tasks") == [("lines", "active", 0), ("points", "active", 0)]
    assert after["schema_version"] == [(2,)]
    assert after["contributions"] == [(*each, "") for each in before["contributions"]]
    times = {(task, version, number): replaced for task, version, number, *_, replaced, _, _ in after["releases"]}
    begin = int(NOW)
    assert times == {
        ("lines", 1, 0): None,
        ("points", 1, 0): begin + 60,
        ("points", 1, 1): begin + 90,
        ("points", 2, 0): begin + 150,
        ("points", 2, 1): None,
    }
    assert [each[:6] for each in after["releases"]] == before["releases"]
    assert all(each[6] == each[7] and each[8] is None for each in after["releases"])
    assert (after["manifests"], after["rounds"]) == (before["manifests"], before["rounds"])
    assert rows(tmp_path / "db.v1") == before
    Store(tmp_path / "new").close()
    assert form(path) == form(tmp_path / "new")
    Store(path).close()
    assert rows(path)["contributions"] == after["contributions"]


def form(path: Path) -> dict[str, object]:
    """Columns, keys and indexes of every table."""
    with closing(sqlite3.connect(path)) as database:
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type='table'")]
        indexes = "SELECT name, sql FROM sqlite_master WHERE type='index' ORDER BY name"
        columns = {name: sorted(each[1:] for each in database.execute(f"PRAGMA table_info({name})")) for name in names}
        return columns | {"indexes": list(database.execute(indexes))}


def killed_at(step: int, path: Path) -> int:
    """The exit code of a process that opens the database and dies before its statement or commit of that number."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = [step]

    def count(*_: object) -> None:
        left[0] -= 1
        if not left[0]:
            os._exit(9)

    try:
        sa.event.listen(sa.Engine, "before_cursor_execute", count)
        sa.event.listen(sa.Engine, "commit", count)
        Store(path)
        os._exit(0)
    finally:
        os._exit(1)


def test_killed_while_moving_over(tmp_path: Path) -> None:
    """Whenever the process dies, the database is wholly of one of the versions, and the next start ends the way."""
    before = version_1(tmp_path / "db")
    for name in list(tmp_path.iterdir()):
        (tmp_path / f"{name.name}.origin").write_bytes(name.read_bytes())
    ended = [9]
    while ended[-1] == 9:
        for name in tmp_path.glob("db*"):
            if not name.name.endswith(".origin"):
                name.unlink()
        (tmp_path / "db").write_bytes((tmp_path / "db.origin").read_bytes())
        ended.append(killed_at(len(ended), tmp_path / "db"))
        now = rows(tmp_path / "db")
        assert now == before if now["schema_version"] == [(1,)] else now["schema_version"] == [(2,)]
        store = Store(tmp_path / "db")
        assert len(store.tasks()) == 2
        store.close()
        if (tmp_path / "db.v1").exists():
            assert rows(tmp_path / "db.v1") == before
    assert ended[-1] == 0 and len(ended) > 10


def test_version_1_is_not_moved_by_a_reader(tmp_path: Path) -> None:
    """Whoever only looks says what brings it over, and leaves it as it is."""
    before = version_1(tmp_path / "db")
    with pytest.raises(ConfigError, match="has schema 1; `aggregator run` brings it to 2"):
        Store(tmp_path / "db", read_only=True)
    assert rows(tmp_path / "db") == before


def test_one_sql_for_two_databases(tmp_path: Path) -> None:
    """The tables and the INSERT that counts have words in PostgreSQL too."""
    said: list[str] = []

    def note(statement: sa.Executable, *_: object, **__: object) -> None:
        said.append(str(statement.compile(dialect=engine.dialect)))  # type: ignore[attr-defined]

    engine = sa.create_mock_engine("postgresql://", note)
    store_module._meta.create_all(engine, checkfirst=False)
    insert = store_module._INSERTS["postgresql"](store_module._contributions).values(store_module._values(row("a")))
    note(insert.on_conflict_do_nothing().returning(store_module._contributions.c.head_digest))
    text = "\n".join(said)
    assert text.count("CREATE TABLE") == 6 and "ON CONFLICT DO NOTHING RETURNING contributions.head_digest" in text
    assert "BYTEA" in text and "BLOB" not in text


# -- damage and a disk that refuses --------------------------------------------------------------------------------


def filled_store(path: Path) -> list[tuple[str, int]]:
    """A store of some two hundred pages, closed; its tables' and indexes' pages are spread over the file."""
    store = begun(path)
    with store.transaction():
        store.contribute([row(f"device-{number}", number, head=bytes(1500)) for number in range(300)])
    store.close()
    return [(path.name, path.stat().st_size) for path in path.parent.iterdir()]


def test_a_damaged_page(tmp_path: Path) -> None:
    """Whichever page it is: it is noticed at the start, names the file and the way out, or holds only free content."""
    filled_store(tmp_path / "db")
    whole = (tmp_path / "db").read_bytes()
    noticed = 0
    for page in range(0, len(whole), 4096 * 7):
        damaged = whole[:page] + b"\xa5" * 4096 + whole[page + 4096 :]
        (tmp_path / "db").write_bytes(damaged)
        with pytest.raises(ConfigError) as caught:
            Store(tmp_path / "db")
        assert caught.value.path == str(tmp_path / "db")
        assert "is damaged (" in caught.value.advice and "`aggregator restore" in caught.value.advice
        assert (tmp_path / "db").read_bytes() == damaged
        noticed += 1
    assert noticed > 10
    (tmp_path / "db").write_bytes(whole)
    Store(tmp_path / "db").close()


def test_a_large_file_is_checked_after_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a while, so not after a clean stop; a process that dies leaves its mark."""
    filled_store(tmp_path / "db")
    monkeypatch.setattr(sqlite, "SMALL", 1000)
    whole = bytearray((tmp_path / "db").read_bytes())
    page = whole.index(b"device-150") // 4096 * 4096
    whole[page : page + 4096] = b"\xa5" * 4096
    (tmp_path / "db").write_bytes(whole)
    store = Store(tmp_path / "db")
    with pytest.raises(ConfigError, match="is damaged"):
        store.contributions("points", 1, 1)
    store.close()
    assert killed_at(10_000, tmp_path / "db") == 0  # opened, and never closed
    assert [path.name for path in tmp_path.glob("*.in-use")] == ["db.in-use"]
    with pytest.raises(ConfigError, match="is damaged"):
        Store(tmp_path / "db")


def test_a_record_that_is_none(tmp_path: Path) -> None:
    """A page can be whole and its content not: what was stored verified and cannot be read is damage too."""
    begun(tmp_path / "db").close()
    with sqlite3.connect(tmp_path / "db") as database:
        database.execute("UPDATE releases SET signed = x'00'")
    store = Store(tmp_path / "db")
    for ask in (store.tasks, lambda: store.release("points", 1, 0), lambda: store.retained("points")):
        with pytest.raises(ConfigError, match=r"db: is damaged \(a record in it is"):
            ask()
    store.close()


def test_a_full_disk(tmp_path: Path) -> None:
    """What did not fit has changed nothing, and says that it may pass; the same works as soon as there is room."""
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        store = begun(disk / "db")
        many = [row(f"device-{number}", number, head=bytes(1000)) for number in range(500)]
        before = store.tasks()
        with filled(disk, leave=65536):
            for _ in range(3):
                with pytest.raises(StorageError, match="full") as caught, store.transaction():
                    assert len(store.contribute(many)) == 500
                    store.end_round("points", 1, 1, "released", NOW)
                assert (caught.value.passing, caught.value.path) == (True, str(disk / "db"))
                assert store.tasks() == before
        with store.transaction():
            assert len(store.contribute(many)) == 500
            store.end_round("points", 1, 1, "released", NOW)
        store.close()
        again = Store(disk / "db")
        assert len(again.contributions("points", 1, 1)) == 500
        again.close()


def test_no_room_to_begin(tmp_path: Path) -> None:
    """A full disk is no wrong setting: the service manager may try again, and nothing is spoilt by then."""
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        before = version_1(disk / "db")
        with filled(disk), pytest.raises(StorageError) as caught:
            Store(disk / "db")
        assert caught.value.passing
        assert sorted(path.name for path in disk.iterdir() if "new" in path.name or "v1" in path.name) == []
        assert rows(disk / "db") == before
        store = Store(disk / "db")
        assert len(store.tasks()) == 2
        store.close()


def test_a_database_that_may_not_be_written(tmp_path: Path) -> None:
    """A disk that went read-only, as they do after errors, refuses the start in the same words."""
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        begun(disk / "db").close()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(StorageError, match="Read-only"):
            Store(disk / "db")


def test_the_last_update_of_a_device(tmp_path: Path) -> None:
    """The newest, counted or not, of the newest rounds; nothing of devices that nobody asks about."""
    store = begun(tmp_path / "db")
    with store.transaction():
        store.contribute([row("a", 1), row("b", 2)])
        store.end_round("points", 1, 1, "released", NOW)
        store.open_round("points", 1, 2, offer(2), NOW + 10)
        again = row(
            "a", 1, origin_round=2, collected_in=2, at=NOW + 20, outcome="rejected", reason="bad_body", head=b""
        )
        store.contribute([again])
    found = store.last_updates(["a", "b", "c"])
    assert {name: (each.origin_round, each.outcome) for name, each in found.items()} == {
        "a": (2, "rejected"),
        "b": (1, "accepted"),
    }
    assert list(store.last_updates(["b"])) == ["b"] and store.last_updates([]) == {}
    assert store.last_updates(["b"], rounds=1) == {}
    store.close()
