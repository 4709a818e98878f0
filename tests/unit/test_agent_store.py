"""What a device remembers: positions that only rise, and a release that is whole or not there."""

import dataclasses
import os
from hashlib import sha256
from pathlib import Path

import pytest

from edge_agent import store as module
from edge_agent.jobs import LeftJob
from edge_agent.store import Kept, Rank, Store, TaskState
from shared import chunks, signing, wire
from shared.errors import ConfigError, StorageError
from shared.messages import Release, ReleaseMessage, TaskManifest
from shared.trust import Position
from tests.records import Records

RECORDS = Records()
OFFER = Position((1, 3, 2), b"o" * 32)


def positions(message: ReleaseMessage) -> tuple[Position, Position]:
    """(manifest's, release's)."""
    manifest = wire.unpack(message.manifest.payload, TaskManifest)
    release = wire.unpack(message.release.payload, Release)
    return (
        Position((manifest.version,), signing.digest(message.manifest)),
        Position((manifest.version, release.number), signing.digest(message.release)),
    )


def kept(message: ReleaseMessage, offer: Position | None = None, worked: tuple[int, int] = (0, 0)) -> Kept:
    """How a whole release reads back."""
    manifest, release = positions(message)
    return Kept("points", message.manifest, message.release, release, manifest, offer, worked)


def keep(store: Store, message: ReleaseMessage) -> None:
    """Make a release the newest."""
    store.keep_release("points", message, *positions(message))


def begun(folder: Path) -> tuple[Store, ReleaseMessage]:
    """A store with a release, an offer and some work."""
    store, message = Store(folder), RECORDS.message()
    keep(store, message)
    store.keep_offer("points", OFFER)
    store.keep_worked("points", (1, 2))
    return store, message


def stored(folder: Path) -> set[str]:
    """Names of the files of the task."""
    return {path.name for path in (folder / "tasks" / "points").iterdir()}


def names(message: ReleaseMessage) -> set[str]:
    """Of the files that a release needs."""
    assert message.graphs is not None and message.weights is not None
    parts = (wire.pack(message.manifest), wire.pack(message.release), message.graphs.train, message.graphs.eval)
    return {sha256(part).hexdigest() for part in (*parts, message.weights)}


def weights_name(message: ReleaseMessage) -> str:
    """Of the file that holds its weights."""
    assert message.weights is not None
    return sha256(message.weights).hexdigest()


def test_a_new_device(tmp_path: Path) -> None:
    """The folders are made, for nobody else to read, and nothing is known."""
    store = Store(tmp_path / "state")
    assert store.load() == []
    assert {path.name for path in (tmp_path / "state").iterdir()} == {"tasks", "spool", "outbox", "jobs"}
    assert (tmp_path / "state" / "tasks").stat().st_mode & 0o077 == 0


def test_no_place(tmp_path: Path) -> None:
    """A state directory that cannot be used is a mistake of the configuration."""
    (tmp_path / "state").write_text("a file")
    with pytest.raises(ConfigError, match="state_dir"):
        Store(tmp_path / "state")


def test_across_a_restart(tmp_path: Path) -> None:
    """Release, positions and the last round worked for come back as they were."""
    _, message = begun(tmp_path)
    assert Store(tmp_path).load() == [kept(message, OFFER, (1, 2))]
    assert Store(tmp_path).load() == [kept(message, OFFER, (1, 2))]


def test_a_task_begins_anew(tmp_path: Path) -> None:
    """What is forgotten is gone after a restart too, and no old offer binds what comes next."""
    store, message = begun(tmp_path)
    store.forget("points")
    assert list((tmp_path / "tasks").iterdir()) == []
    assert Store(tmp_path).load() == []
    keep(store, message)
    assert Store(tmp_path).load() == [kept(message)]
    store.forget("nothing")


def test_every_file_is_where_the_trainer_looks(tmp_path: Path) -> None:
    """Graphs and weights lie under the names that the signed records give them."""
    store, message = begun(tmp_path)
    assert message.graphs is not None and message.weights is not None
    manifest = wire.unpack(message.manifest.payload, TaskManifest)
    release = wire.unpack(message.release.payload, Release)
    train, evaluate, weights = store.files("points", manifest, release)
    assert train.read_bytes() == message.graphs.train
    assert evaluate.read_bytes() == message.graphs.eval
    assert weights.read_bytes() == message.weights


def test_tasks_do_not_mix(tmp_path: Path) -> None:
    """Each task has its own positions; they come back by name."""
    store, message = begun(tmp_path)
    store.keep_offer("a-task", Position((7, 1, 0), b"7" * 32))
    first, second = Store(tmp_path).load()
    assert first == Kept("a-task", None, None, None, None, Position((7, 1, 0), b"7" * 32), (0, 0))
    assert second == kept(message, OFFER, (1, 2))


def test_an_offer_before_any_release(tmp_path: Path) -> None:
    """Its position is kept though no release is, and a release that follows keeps it too."""
    Store(tmp_path).keep_offer("points", OFFER)
    store = Store(tmp_path)
    assert store.load() == [Kept("points", None, None, None, None, OFFER, (0, 0))]
    message = RECORDS.message()
    keep(store, message)
    assert Store(tmp_path).load() == [kept(message, OFFER)]


def test_unused_files_go(tmp_path: Path) -> None:
    """After a newer release only its own files, the weights before it and the state remain."""
    store, message = begun(tmp_path)
    assert stored(tmp_path) == names(message) | {"state"}
    newer = RECORDS.message(number=1, value=2.0)
    keep(store, newer)
    assert stored(tmp_path) == names(newer) | {"state", weights_name(message)}
    assert names(newer) & names(message)  # the graphs and the manifest were not written again
    assert Store(tmp_path).load() == [kept(newer, OFFER, (1, 2))]
    newest = RECORDS.message(number=2, value=3.0)
    again = Store(tmp_path)
    again.load()
    keep(again, newest)
    assert weights_name(message) not in stored(tmp_path)


def test_a_crash_before_the_state_is_replaced(tmp_path: Path) -> None:
    """New files beside the old state: the old release is whole and the newest; the next release sweeps them away."""
    store, message = begun(tmp_path)
    before = (tmp_path / "tasks" / "points" / "state").read_bytes()
    newer = RECORDS.message(number=1, value=2.0)
    keep(store, newer)
    replay = Store(tmp_path / "again")
    keep(replay, message)
    folder = tmp_path / "again" / "tasks" / "points"
    for name in names(newer):
        (folder / name).write_bytes((tmp_path / "tasks" / "points" / name).read_bytes())
    (folder / "state").write_bytes(before)
    (folder / ".state.new").write_bytes(b"half")
    again = Store(tmp_path / "again")
    assert again.load() == [kept(message, OFFER, (1, 2))]
    newest = RECORDS.message(number=2, value=3.0)
    keep(again, newest)
    assert {path.name for path in folder.iterdir()} == names(newest) | {"state", weights_name(message)}


def test_a_crash_before_the_old_files_went(tmp_path: Path) -> None:
    """The new state beside old files is the new release."""
    store, _ = begun(tmp_path)
    folder = tmp_path / "tasks" / "points"
    old = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "state"}
    newer = RECORDS.message(number=1, value=2.0)
    keep(store, newer)
    for name, data in old.items():
        (folder / name).write_bytes(data)
    assert Store(tmp_path).load() == [kept(newer, OFFER, (1, 2))]


@pytest.mark.parametrize("harm", ["cut", "flip", "gone", "empty"])
@pytest.mark.parametrize("which", range(5))
def test_a_damaged_file(tmp_path: Path, which: int, harm: str) -> None:
    """A release of which one byte is wrong is none; how far releases and offers have come is still known."""
    _, message = begun(tmp_path)
    path = tmp_path / "tasks" / "points" / sorted(names(message))[which]
    data = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": data[:-1], "flip": data[:-1] + bytes([data[-1] ^ 1]), "empty": b""}[harm])
    whole = kept(message, OFFER, (1, 2))
    assert Store(tmp_path).load() == [dataclasses.replace(whole, manifest=None, release=None)]


@pytest.mark.parametrize("which", range(5))
def test_a_damaged_file_is_made_good(tmp_path: Path, which: int) -> None:
    """The broker has the release still: keeping it once more repairs what was damaged."""
    _, message = begun(tmp_path)
    (tmp_path / "tasks" / "points" / sorted(names(message))[which]).write_bytes(b"damaged")
    store = Store(tmp_path)
    store.load()
    keep(store, message)
    assert Store(tmp_path).load() == [kept(message, OFFER, (1, 2))]


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80", b"\x81\xa1v\x02", b"x" * 70_000])
def test_a_damaged_state(tmp_path: Path, content: bytes) -> None:
    """It is as good as none: the task begins anew, and other tasks are not touched by it."""
    store, message = begun(tmp_path)
    store.keep_offer("other", OFFER)
    (tmp_path / "tasks" / "points" / "state").write_bytes(content)
    again = Store(tmp_path)
    assert [each.name for each in again.load()] == ["other"]
    keep(again, message)
    assert kept(message) in Store(tmp_path).load()


def test_strange_folders(tmp_path: Path) -> None:
    """What cannot be a task's name, or has no state, is left out and left alone."""
    begun(tmp_path)
    (tmp_path / "tasks" / "lost+found").mkdir()
    (tmp_path / "tasks" / "no-state").mkdir()
    (tmp_path / "tasks" / "file").write_text("x")
    (tmp_path / "tasks" / "odd").mkdir()
    (tmp_path / "tasks" / "odd" / "state").mkdir()
    assert [each.name for each in Store(tmp_path).load()] == ["points"]


def test_a_release_in_parts_is_never_kept(tmp_path: Path) -> None:
    """An announcement alone cannot become the newest release."""
    store = Store(tmp_path)
    message = RECORDS.message()
    bare = ReleaseMessage(1, message.manifest, message.release)
    with pytest.raises(ValueError):
        store.keep_release("points", bare, *positions(message))
    assert store.load() == []


def test_the_state_is_bounded(tmp_path: Path) -> None:
    """A whole state is far below the limit above which it is not read."""
    begun(tmp_path)
    assert (tmp_path / "tasks" / "points" / "state").stat().st_size * 10 < module._STATE_MAX


# -- weights in chunks -------------------------------------------------------------------------------------------

BLOB = os.urandom(5000)
REF = chunks.describe(BLOB, 1024)


def in_chunks(number: int = 1) -> ReleaseMessage:
    """A release whose weights are BLOB and do not travel with it."""
    signed = RECORDS.sign_manifest(RECORDS.manifest())
    return ReleaseMessage(2, signed, RECORDS.release(signed, number, v=2, weights=REF), RECORDS.message().graphs, None)


def fetched(store: Store, *numbers: int) -> list[int] | None:
    """What is missing, after these chunks came."""
    found = store.open_spool("points", REF)
    for index in numbers:
        store.write_chunk("points", REF.sha256, index, BLOB[index * 1024 : (index + 1) * 1024])
    return found


def test_weights_in_chunks(tmp_path: Path) -> None:
    """They are gathered over restarts, move to where the trainer looks, and the release is kept without their bytes."""
    assert fetched(Store(tmp_path), 0, 3) == [0, 1, 2, 3, 4]
    store = Store(tmp_path)
    assert fetched(store, 1, 2, 4) == [1, 2, 4]
    store.finish_spool("points", REF.sha256)
    assert list((tmp_path / "spool").iterdir()) == []
    message = in_chunks()
    keep(store, message)
    assert (tmp_path / "tasks" / "points" / REF.sha256.hex()).read_bytes() == BLOB
    again = Store(tmp_path)
    assert again.load() == [kept(message)]
    assert again.open_spool("points", REF) is None


def test_weights_of_the_release_before_are_not_fetched(tmp_path: Path) -> None:
    """A rollback finds them on the disk."""
    store = Store(tmp_path)
    fetched(store, *range(5))
    store.finish_spool("points", REF.sha256)
    keep(store, in_chunks())
    keep(store, RECORDS.message(number=2))
    assert store.open_spool("points", REF) is None


def test_weights_that_were_damaged_are_mended(tmp_path: Path) -> None:
    """What is right in them is not fetched again."""
    store = Store(tmp_path)
    fetched(store, *range(5))
    store.finish_spool("points", REF.sha256)
    keep(store, in_chunks())
    path = tmp_path / "tasks" / "points" / REF.sha256.hex()
    path.write_bytes(BLOB[:1500] + bytes([BLOB[1500] ^ 1]) + BLOB[1501:])
    again = Store(tmp_path)
    assert [each.release for each in again.load()] == [None]
    assert fetched(again, 1) == [1]
    again.finish_spool("points", REF.sha256)
    assert path.read_bytes() == BLOB


def test_one_download_of_a_task(tmp_path: Path) -> None:
    """A newer blob takes the place of an older one; other tasks' files stay, and what is late goes nowhere."""
    store = Store(tmp_path)
    store.open_spool("other", REF)
    fetched(store, 0)
    newer = chunks.describe(BLOB[::-1], 1024)
    store.open_spool("points", newer)
    store.write_chunk("points", REF.sha256, 1, BLOB[1024:2048])
    assert {path.name for path in (tmp_path / "spool").iterdir()} == {
        f"other.{REF.sha256.hex()}",
        f"points.{newer.sha256.hex()}",
    }
    with pytest.raises(StorageError):
        store.finish_spool("points", REF.sha256)
    store.forget("points")
    assert [path.name for path in (tmp_path / "spool").iterdir()] == [f"other.{REF.sha256.hex()}"]


def test_a_download_that_nobody_wants(tmp_path: Path) -> None:
    """Its room is given back, and the download of another task goes on."""
    store = Store(tmp_path)
    store.open_spool("other", REF)
    fetched(store, 0, 1)
    store.drop_spool("other")
    assert [path.name for path in (tmp_path / "spool").iterdir()] == [f"points.{REF.sha256.hex()}"]
    store.write_chunk("points", REF.sha256, 2, BLOB[2048:3072])
    assert store.open_spool("points", REF) == [3, 4]
    store.drop_spool("points")
    assert list((tmp_path / "spool").iterdir()) == []
    store.write_chunk("points", REF.sha256, 3, BLOB[3072:4096])


def test_a_download_of_a_task_that_is_gone(tmp_path: Path) -> None:
    """What nobody went on with for a month leaves the disk when the agent starts; a slow one goes on."""
    store = Store(tmp_path)
    fetched(store, 0, 1)
    store.open_spool("other", REF)
    old = (tmp_path / "spool" / f"points.{REF.sha256.hex()}").stat().st_mtime
    os.utime(tmp_path / "spool" / f"other.{REF.sha256.hex()}", (old - 5 * 86_400, old - 5 * 86_400))
    Store(tmp_path).sweep_spools(old + 29 * 86_400)
    assert [path.name for path in (tmp_path / "spool").iterdir()] == [f"points.{REF.sha256.hex()}"]
    Store(tmp_path).sweep_spools(old + 31 * 86_400)
    assert list((tmp_path / "spool").iterdir()) == []


def test_a_chunk_that_cannot_be_written(tmp_path: Path) -> None:
    """The download is over: nothing that comes after it makes a file that looks whole."""
    store = Store(tmp_path)
    fetched(store, 0)
    (spool,) = (tmp_path / "spool").iterdir()
    spool.unlink()
    with pytest.raises(StorageError):
        store.write_chunk("points", REF.sha256, 1, BLOB[1024:2048])
    store.write_chunk("points", REF.sha256, 2, BLOB[2048:3072])
    with pytest.raises(StorageError):
        store.finish_spool("points", REF.sha256)


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    """A release in chunks is never kept without them, nor with others."""
    store = Store(tmp_path)
    with pytest.raises(StorageError):
        keep(store, in_chunks())
    (tmp_path / "tasks" / "points").mkdir(exist_ok=True)
    (tmp_path / "tasks" / "points" / REF.sha256.hex()).write_bytes(BLOB[:-1])
    with pytest.raises(StorageError):
        keep(store, in_chunks())
    assert Store(tmp_path).load() == []


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    """Every write that fails is a StorageError that has changed nothing, and works once the disk does."""
    store, message = begun(tmp_path)
    folder = tmp_path / "tasks" / "points"
    aside = folder.rename(tmp_path / "aside")
    folder.write_text("no folder")
    newer = RECORDS.message(number=1, value=2.0)
    for act in (
        lambda: keep(store, newer),
        lambda: store.keep_offer("points", Position((1, 4, 0), b"n" * 32)),
        lambda: store.keep_worked("points", (1, 3)),
        lambda: store.forget("points"),
    ):
        with pytest.raises(StorageError):
            act()
    folder.unlink()
    aside.rename(folder)
    assert Store(tmp_path).load() == [kept(message, OFFER, (1, 2))]
    keep(store, newer)
    store.keep_worked("points", (1, 3))
    assert Store(tmp_path).load() == [kept(newer, OFFER, (1, 3))]


def test_an_older_answer_takes_nothing_back(tmp_path: Path) -> None:
    """Receipts come in any order; the newest round stays the newest."""
    store, message = begun(tmp_path)
    store.keep_worked("points", (1, 1))
    assert Store(tmp_path).load() == [kept(message, OFFER, (1, 2))]


FROZEN = bytes.fromhex(
    "8aa17601a86d616e6966657374c4206d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6da772656c65617365c4"
    "207272727272727272727272727272727272727272727272727272727272727272ab747261696e5f6772617068c420747474747474747474"
    "7474747474747474747474747474747474747474747474aa6576616c5f6772617068c4206565656565656565656565656565656565656565"
    "656565656565656565656565a777656967687473c4207777777777777777777777777777777777777777777777777777777777777777b072"
    "656c656173655f706f736974696f6e82a472616e6b920307a6646967657374c4205252525252525252525252525252525252525252525252"
    "525252525252525252b16d616e69666573745f706f736974696f6e82a472616e6b9103a6646967657374c4204d4d4d4d4d4d4d4d4d4d4d4d"
    "4d4d4d4d4d4d4d4d4d4d4d4d4d4d4d4d4d4d4d4dae6f666665725f706f736974696f6e82a472616e6b93030801a6646967657374c4204f4f"
    "4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4fa6776f726b6564920307"
)


def test_a_state_of_the_first_release_is_read(tmp_path: Path) -> None:
    """Bytes as version 0.1.0 wrote them: a device that is upgraded knows all that it knew."""
    state = TaskState(
        v=1,
        manifest=b"m" * 32,
        release=b"r" * 32,
        train_graph=b"t" * 32,
        eval_graph=b"e" * 32,
        weights=b"w" * 32,
        release_position=Rank([3, 7], b"R" * 32),
        manifest_position=Rank([3], b"M" * 32),
        offer_position=Rank([3, 8, 1], b"O" * 32),
        worked=[3, 7],
    )
    (tmp_path / "tasks" / "points").mkdir(parents=True)
    (tmp_path / "tasks" / "points" / "state").write_bytes(FROZEN)
    assert wire.pack(state) == FROZEN
    (found,) = Store(tmp_path).load()
    assert found.release_position == Position((3, 7), b"R" * 32)
    assert (found.offer_position, found.worked) == (Position((3, 8, 1), b"O" * 32), (3, 7))


def test_jobs_that_were_begun(tmp_path: Path) -> None:
    """They read back as they were, newest first, until they are dropped; what belongs to none of them is deleted."""
    store = Store(tmp_path)
    older, newer = (LeftJob(1, digit * 32, "points", (1, 2), bytes(32), b"context", 7) for digit in "ab")
    for moment, job in enumerate((older, newer)):
        store.keep_job(job)
        os.utime(tmp_path / "jobs" / job.id, (moment, moment))
        store.checkpoint(job.id).write_bytes(b"checkpoint")
    stranger, damaged = "c" * 32, "d" * 32
    store.checkpoint(stranger).write_bytes(b"checkpoint")
    (tmp_path / "jobs" / damaged).write_bytes(wire.pack(older))  # under another's name
    assert Store(tmp_path).jobs() == [newer, older]
    assert {path.name[0] for path in (tmp_path / "jobs").iterdir()} == {"a", "b"}
    store.drop_job(newer.id)
    assert Store(tmp_path).jobs() == [older] and store.checkpoint(older.id).exists()
    assert not store.checkpoint(newer.id).exists()
