"""Downloads of blobs from a broker gone bad, over crashes and damaged disks: what is kept is what was signed."""

import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random

from msgspec import structs

from shared import chunks
from shared.errors import Reason, RemoteProtocolError, StorageError
from shared.fetch import WINDOW, Fetch, Progress
from shared.messages import BlobRef
from shared.spool import Spool
from tests.fuzz.mutate import NUMBERS, spoil
from tests.fuzz.target import Target, folder


@dataclass(frozen=True)
class Session:
    """A blob, how its reference lies about it, and the seed of what happens to its download."""

    data: bytes
    chunk: int
    lie: str
    seed: int


_LIES = ("", "", "", "", "digest", "hash", "huge", "one_huge")


def _make(rng: Random) -> Session:
    return Session(
        rng.randbytes(rng.randrange(1, 400)),
        rng.randrange(1, 40),
        _LIES[rng.randrange(len(_LIES))],
        rng.randrange(2**32),
    )


def _reference(session: Session) -> BlobRef:
    blob = chunks.describe(session.data, session.chunk)
    match session.lie:
        case "digest":
            return structs.replace(blob, sha256=bytes(32))
        case "hash":
            return structs.replace(blob, chunks=[bytes(32), *blob.chunks[1:]])
        case "huge":
            return BlobRef(bytes(32), 2**60, 2**50, [bytes(32)] * 1024)
        case "one_huge":
            return BlobRef(bytes(32), 2**62, 2**62, [bytes(32)])
        case _:
            return blob


def _judge(session: Session) -> bool:
    """Only chunks that hash as signed are written, each once, in its place; what is whole is as signed or refused."""
    rng = Random(session.seed)
    blob = _reference(session)
    path, target = folder("downloads") / "part", folder("downloads") / "whole"
    path.unlink(missing_ok=True)
    target.unlink(missing_ok=True)
    pieces = [bytes(piece) for piece in chunks.pieces(session.data, session.chunk)]
    now = 0.0
    for _ in range(4):
        spool = Spool(path, blob)
        try:
            missing = spool.missing()
        except StorageError as error:
            assert session.lie.endswith("huge") and error.passing
            assert not path.exists()
            return False
        assert not session.lie.endswith("huge"), "room was found for a blob of an exabyte"
        written = {index for index in range(len(pieces)) if index not in missing}
        if session.lie != "hash":
            assert all(path.read_bytes()[slice(*_span(session, index))] == pieces[index] for index in written)
        fetch = Fetch(blob, missing, now)
        wanted = set(fetch.connected(now))
        if not fetch.left:
            return _finish(spool, target, session)
        for _ in range(rng.randrange(3, 60)):
            now += rng.random() * 30
            if rng.randrange(25) == 0:
                fetch.disconnected()
                assert fetch.deadline is None
                wanted |= set(fetch.connected(now))  # a durable session knows the earlier ones still
            assert wanted == set(fetch.given_up()) and len(set(wanted) - written) <= WINDOW
            index, payload = _sent(rng, pieces, sorted(wanted))
            left = fetch.left
            try:
                step = fetch.arrived(index, payload, now)
            except RemoteProtocolError as error:
                assert error.reason in (Reason.UNASKED, Reason.WRONG_DIGEST)
                assert (fetch.left, set(fetch.given_up())) == (left, wanted), "a refusal has changed something"
                continue
            if step.progress is Progress.GONE:
                assert payload == b"" and not step.write
                break
            if step.write:
                assert index not in written and sha256(payload).digest() == blob.chunks[index]
                spool.write(index, payload)
                written.add(index)
                assert fetch.left == left - 1
            else:
                assert index in written
            wanted -= set(step.unsubscribe)
            wanted |= set(step.subscribe)
            assert os.path.getsize(path) == blob.size
            if step.progress is Progress.DONE:
                assert not fetch.left
                return _finish(spool, target, session)
        _crash(rng, path)
    return False


def _span(session: Session, index: int) -> tuple[int, int]:
    return chunks.span(len(session.data), session.chunk, index)


def _sent(rng: Random, pieces: list[bytes], wanted: list[int]) -> tuple[int, bytes]:
    """A chunk as the broker sends it: mostly one that was asked for and is right."""
    index = wanted[rng.randrange(len(wanted))] if wanted and rng.randrange(8) else rng.choice((0, 1, *NUMBERS))
    payload = pieces[index] if 0 <= index < len(pieces) else b"junk"
    match rng.randrange(16):
        case 0:
            payload = spoil(payload, rng, pieces)
        case 1:
            payload = pieces[rng.randrange(len(pieces))]
        case 2 if rng.randrange(4) == 0:
            payload = b""
        case _:
            pass
    return index, payload


def _crash(rng: Random, path: Path) -> None:
    """The process is gone; perhaps the disk kept something else than was written."""
    match rng.randrange(6):
        case 0 if path.exists():
            path.write_bytes(spoil(path.read_bytes(), rng))
        case 1:
            path.unlink(missing_ok=True)
        case 2 if path.exists():
            os.truncate(path, rng.randrange(500))
        case _:
            pass


def _finish(spool: Spool, target: Path, session: Session) -> bool:
    try:
        spool.finish(target)
    except RemoteProtocolError as error:
        assert error.reason is Reason.WRONG_DIGEST and session.lie == "digest"
        assert not target.exists() and not spool.path.exists()
        return False
    assert target.read_bytes() == session.data and session.lie != "digest"
    assert not spool.path.exists()
    return True


def _good() -> list[Session]:
    # The seed is of a download that comes to its end.
    return [next(each for each in (Session(bytes(range(99)), 40, "", seed) for seed in range(99)) if _judge(each))]


DOWNLOADS = Target("downloads", _make, _judge, _good, examples=300, soak=50_000)
TARGETS = [DOWNLOADS]
