"""What is on its way survives everything, and what is damaged is not sent."""

import os
from hashlib import sha256
from pathlib import Path

import pytest

from edge_agent.delivery import Update
from edge_agent.outbox import Damaged, Outbox
from shared import wire
from shared.errors import StorageError
from shared.messages import UpdateHead

BODY = os.urandom(2500)


def made(outbox: Outbox, id: str = "0a", round_number: int = 1, chunk_size: int = 1024) -> Update:
    """An update whose body the trainer has written."""
    outbox.body(id).write_bytes(BODY)
    head = wire.pack(
        UpdateHead(
            2 if chunk_size else 1, b"context", bytes(32), len(BODY), sha256(BODY).digest(), chunk_size, b"c", []
        )
    )
    return Update(id, "points", (1, round_number), head, sha256(head).digest(), 2, len(BODY), chunk_size, 1_900_000_000)


def test_across_a_restart(tmp_path: Path) -> None:
    """Updates come back as they were, with their signatures, the oldest round first."""
    outbox = Outbox(tmp_path)
    second, first = made(outbox, "0a", 2), made(outbox, "0b", 1, chunk_size=0)
    outbox.keep(second, b"signature 2")
    outbox.keep(first, b"signature 1")
    again = Outbox(tmp_path)
    assert again.load() == [first, second]
    assert [again.signature(each.id) for each in (first, second)] == [b"signature 1", b"signature 2"]
    assert Outbox(tmp_path).load() == [first, second]


def test_only_the_piece_that_is_asked_for_is_read(tmp_path: Path) -> None:
    """By number; all of it for a body that rides along."""
    outbox = Outbox(tmp_path)
    update = made(outbox)
    assert [outbox.read(update, index) for index in range(3)] == [BODY[:1024], BODY[1024:2048], BODY[2048:]]
    assert outbox.read(update) == BODY


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "gone", "name"])
@pytest.mark.parametrize("kind", ["entry", "body"])
def test_damage(tmp_path: Path, kind: str, harm: str) -> None:
    """An update of which one byte is wrong is told, deleted and not sent; the others are not touched by it."""
    outbox = Outbox(tmp_path)
    sound, broken = made(outbox, "0a"), made(outbox, "0b", 2)
    outbox.keep(sound, b"signature")
    outbox.keep(broken, b"signature")
    path = tmp_path / f"0b.{kind}"
    data = path.read_bytes()
    if harm == "name":
        path.rename(tmp_path / f"0c.{kind}")
    elif harm == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": data[:-1], "flip": data[:-1] + bytes([data[-1] ^ 1]), "empty": b""}[harm])
    again = Outbox(tmp_path)
    found = again.load()
    assert [each for each in found if isinstance(each, Update)] == [sound]
    # A body alone was never promised to anybody.
    told = {each.id for each in found if isinstance(each, Damaged)}
    assert told == (
        set() if kind == "entry" and harm == "gone" else {"0c" if (kind, harm) == ("entry", "name") else "0b"}
    )
    assert {path.name for path in tmp_path.iterdir()} == {"0a.entry", "0a.body"}


def test_what_was_never_kept_goes(tmp_path: Path) -> None:
    """Bodies of jobs that were cut off, and half-written files."""
    outbox = Outbox(tmp_path)
    made(outbox)
    (tmp_path / ".0b.body.new").write_bytes(b"half")
    assert Outbox(tmp_path).load() == []
    assert list(tmp_path.iterdir()) == []


def test_dropped_is_gone(tmp_path: Path) -> None:
    """Both files, also after a restart; what is not there is no error."""
    outbox = Outbox(tmp_path)
    outbox.keep(made(outbox), b"signature")
    outbox.drop("0a")
    outbox.drop("0a")
    assert Outbox(tmp_path).load() == []
    assert list(tmp_path.iterdir()) == []


def test_a_body_that_is_not_there(tmp_path: Path) -> None:
    """Gone, or shorter than its head says: a StorageError, and never less than was asked for."""
    outbox = Outbox(tmp_path)
    update = made(outbox)
    outbox.body("0a").write_bytes(BODY[:2000])
    with pytest.raises(StorageError):
        outbox.read(update, 1)
    outbox.body("0a").unlink()
    for index in (None, 0):
        with pytest.raises(StorageError):
            outbox.read(update, index)


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    """An entry that cannot be written is a StorageError; what cannot be deleted stays for now."""
    outbox = Outbox(tmp_path / "gone")
    update = Update("0a", "points", (1, 1), b"head", bytes(32), 1, 10, 0, 1)
    with pytest.raises(StorageError):
        outbox.keep(update, b"signature")
    outbox.drop("0a")
