"""All that the aggregator cannot do without, as one file, and back from it.

    FILE: a tar of plain files: aggregator.db, blobs/<sha256> ..., and last manifest-<sha256 of itself>.json, which
    has size and sha256 of each

A backup is consistent while the daemon runs: a snapshot of the database, then the graphs and weights that it names.
It never holds a round's private key nor the body of an update, so an open round cannot go on from it.

Nothing of an archive is believed before all of it was read once and fits its manifest to the last byte; then each
member is written under a name that was checked, and hashed again. Whatever interrupts it, the state directory has its
old database or the restored one, whole.
"""

import contextlib
import errno
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import msgspec
from msgspec import Meta, Struct

from aggregator import sqlite
from aggregator.blobs import file_of
from aggregator.config import AggregatorConfig
from aggregator.ports import BlobLost
from aggregator.store import SCHEMA_VERSION, Store
from shared.errors import Reason, RemoteProtocolError, StorageError
from shared.files import hold, sync_folder
from shared.version import VERSION

DATABASE = "aggregator.db"
_NAMES = re.compile(r"aggregator\.db|blobs/(?P<blob>[0-9a-f]{64})|manifest-(?P<manifest>[0-9a-f]{64})\.json")
_MANIFEST_MAX = 16 << 20
_REMEDY = "bring it back with `aggregator restore` of an earlier backup, or publish a higher version of its task"
_TRIES = 10
"""Snapshots, where the daemon meanwhile replaced all that one names."""
_BLOCK = 512
_READ = 1 << 20
_END = bytes(2 * _BLOCK)


class Member(Struct, frozen=True, forbid_unknown_fields=True):
    """What a file in the archive must be."""

    size: Annotated[int, Meta(ge=0)]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """What an archive says of itself. `made` is in Unix seconds."""

    format: Literal[1]
    program: str
    schema: int
    made: int
    tasks: list[str]
    members: dict[str, Member]


@dataclass(frozen=True, slots=True)
class Made:
    """A backup that was written. `left_out` are older weights that could not be read: no way back to them."""

    manifest: Manifest
    size: int
    left_out: list[str] = field(default_factory=list)


# -- out ---------------------------------------------------------------------------------------------------------


def make(config: AggregatorConfig, output: Path, now: float) -> Made:
    """Write a backup, whole under its name or not at all; the daemon may be running.

    BlobLost if a graph or the newest weights of a task are gone or damaged.
    """
    workshop = output.with_name(f".{output.name}.work")
    new = output.with_name(f"{output.name}.new")
    blobs = config.state.directory / "blobs"
    members: dict[str, Member] = {}
    left_out: list[str] = []
    with _guarded(output, workshop, new), _folder(workshop), contextlib.ExitStack() as held:
        needs = _snapshot(config, workshop / DATABASE, held)
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as out:
                with (workshop / DATABASE).open("rb") as file:
                    members[DATABASE] = _add(out, DATABASE, file)
                for name in sorted(needs.all):
                    try:
                        with needs.newest.get(name) or file_of(blobs, name).open("rb") as file:
                            members[f"blobs/{name.hex()}"] = _add(out, f"blobs/{name.hex()}", file, name.hex())
                    except (BlobLost, FileNotFoundError):
                        if name in needs.newest or name in needs.graphs:
                            raise BlobLost(
                                f"{file_of(blobs, name)} is needed, and gone or damaged; {_REMEDY}"
                            ) from None
                        left_out.append(name.hex())
                manifest = Manifest(1, VERSION, SCHEMA_VERSION, int(now), needs.tasks, members)
                data = msgspec.json.encode(manifest)
                out.write(_header(f"manifest-{sha256(data).hexdigest()}.json", len(data)) + data + _padding(len(data)))
                out.write(_END)
                out.flush()
                os.fsync(out.fileno())
                size = out.tell()
            os.replace(new, output)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        sync_folder(output.parent)
    return Made(manifest, size, left_out)


@dataclass(frozen=True, slots=True)
class _Needs:
    """What a snapshot of the database names."""

    tasks: list[str]
    graphs: set[bytes]
    newest: Mapping[bytes, BinaryIO]
    """The weights of each task's newest release, held open: a quick daemon deletes them before they are copied."""
    older: set[bytes]

    @property
    def all(self) -> set[bytes]:
        return self.graphs | self.newest.keys() | self.older


def _snapshot(config: AggregatorConfig, copy: Path, held: contextlib.ExitStack) -> _Needs:
    """Copy the database and take hold of what it cannot do without."""
    blobs = config.state.directory / "blobs"
    Store(config.database, read_only=True).close()  # says in words what is wrong with it
    tries = 0
    while True:
        tries += 1
        sqlite.copy(config.database, copy)
        store = Store(copy, read_only=True)
        try:
            tasks = [task.name for task in store.tasks()]
            models = [store.model(task.name, task.manifest_version) for task in store.tasks()]
            older = store.weights_in_use(config.limits.keep_releases)
        finally:
            store.close()
        try:
            newest = {name: held.enter_context(file_of(blobs, name).open("rb")) for _, _, name in models}
            return _Needs(tasks, {name for *graphs, _ in models for name in graphs}, newest, older)
        except FileNotFoundError as error:
            if tries == _TRIES:
                raise BlobLost(f"{error.filename} is needed, and gone; {_REMEDY}") from None


def _add(out: BinaryIO, name: str, file: BinaryIO, expected: str | None = None) -> Member:
    """Append a file; BlobLost, and nothing appended, if it has not the hash that is expected."""
    begin, size = out.tell(), os.fstat(file.fileno()).st_size
    out.write(_header(name, size))
    found = _copy(file, out, size)
    if expected not in (None, found):
        out.seek(begin)
        out.truncate()
        raise BlobLost(f"{name} is damaged")
    out.write(_padding(size))
    return Member(size, found)


# -- back --------------------------------------------------------------------------------------------------------


def restore(config: AggregatorConfig, archive: Path, now: float, *, force: bool = False) -> Manifest:
    """Make the state directory what an archive holds; every task is marked as restored, every round is over.

    RemoteProtocolError for an archive that is not whole, OSError where a daemon runs or a database lies there already,
    which `force` sets aside; nothing has changed then.
    """
    state = config.state.directory
    workshop = state / ".restore"
    with _guarded(state), archive.open("rb") as file:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = hold(config.lock_file)
        if lock is None:
            raise BlockingIOError(errno.EAGAIN, "an aggregator runs on this directory; stop it first", str(state))
        with lock, _folder(workshop):
            if config.database.exists() and not force:
                text = "there is a database already; --force sets it aside"
                raise FileExistsError(errno.EEXIST, text, str(config.database))
            manifest, places = verify(file)
            _room(state, sum(member.size for member in manifest.members.values()))
            (state / "blobs").mkdir(mode=0o700, exist_ok=True)
            for name, member in manifest.members.items():
                if name != DATABASE:
                    _extract(file, places[name], member, workshop / "blob")
                    os.replace(workshop / "blob", file_of(state / "blobs", bytes.fromhex(member.sha256)))
            sync_folder(state / "blobs")
            _extract(file, places[DATABASE], manifest.members[DATABASE], workshop / DATABASE)
            _prepare(workshop / DATABASE, state / "blobs", now)
            sqlite.copy(workshop / DATABASE, workshop / "whole.db")
            _set_aside(config.database)
            os.replace(workshop / "whole.db", config.database)
            sync_folder(state)
        _give(state)
    return manifest


def verify(file: BinaryIO) -> tuple[Manifest, dict[str, int]]:
    """Read all of an archive and compare it with its manifest; also says where each member's bytes begin.

    RemoteProtocolError if a single byte is not as it was written.
    """
    found: dict[str, Member] = {}
    places: dict[str, int] = {}
    at, end, manifest = 0, os.fstat(file.fileno()).st_size, None
    while manifest is None:
        file.seek(at)
        name, size = _parse(file.read(_BLOCK))
        if at + _BLOCK + size + len(_padding(size)) + len(_END) > end:
            raise RemoteProtocolError(Reason.MISSING_PART, f"the archive ends in the middle of {name}")
        own = _names(name)["manifest"]
        if own and size > _MANIFEST_MAX:
            raise RemoteProtocolError(Reason.TOO_LARGE, f"a manifest of {size} bytes")
        if name in found:
            raise RemoteProtocolError(Reason.NOT_CANONICAL, f"{name} twice")
        file.seek(places.setdefault(name, at + _BLOCK))
        found[name] = Member(size, _copy(file, None, size))
        if file.read(len(_padding(size))) != _padding(size):
            raise RemoteProtocolError(Reason.NOT_CANONICAL, f"something hides behind {name}")
        if own:
            if found.pop(name).sha256 != own:
                raise RemoteProtocolError(Reason.WRONG_DIGEST, "the manifest is damaged")
            file.seek(places[name])
            manifest = _manifest(file.read(size))
            rest = _padding(size) + _END
            if file.read(len(rest) + 1) != rest:
                raise RemoteProtocolError(Reason.NOT_CANONICAL, "something follows after the manifest")
        at += _BLOCK + size + len(_padding(size))
    for name in sorted(found.keys() | manifest.members.keys() | {DATABASE}):
        if name not in found or name not in manifest.members:
            raise RemoteProtocolError(Reason.MISSING_PART, f"{name} is in the archive or in its manifest, not in both")
        if found[name] != manifest.members[name] or (_names(name)["blob"] or found[name].sha256) != found[name].sha256:
            raise RemoteProtocolError(Reason.WRONG_DIGEST, f"{name} is damaged")
    return manifest, places


def _manifest(data: bytes) -> Manifest:
    try:
        return msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise RemoteProtocolError(Reason.WRONG_TYPE, f"a manifest that this program cannot read: {error}") from None


def _extract(file: BinaryIO, at: int, member: Member, path: Path) -> None:
    file.seek(at)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as out:
        if _copy(file, out, member.size) != member.sha256:
            raise RemoteProtocolError(Reason.WRONG_DIGEST, "the archive was changed while it was read")
        out.flush()
        os.fsync(out.fileno())


def _prepare(database: Path, blobs: Path, now: float) -> None:
    """Bring a restored database to this program's schema, and say in it that it comes from a backup."""
    store = Store(database)
    try:
        with store.transaction():
            store.mark_restored(now)
        for task in store.tasks():
            for name in store.model(task.name, task.manifest_version):
                if not file_of(blobs, name).exists():
                    raise RemoteProtocolError(Reason.MISSING_PART, f"blob {name.hex()} of {task.name} is not in it")
    finally:
        store.close()


def _set_aside(database: Path) -> None:
    """Rename a database with its log, so that it can still be opened under its new name."""
    if database.exists():
        number = 1
        while (aside := database.with_name(f"{database.name}.replaced-{number}")).exists():
            number += 1
        log = database.with_name(f"{database.name}-wal")
        if log.exists():
            os.replace(log, aside.with_name(f"{aside.name}-wal"))
        os.replace(database, aside)
    for rest in ("-wal", "-shm", ".in-use"):
        database.with_name(f"{database.name}{rest}").unlink(missing_ok=True)


def _room(folder: Path, size: int) -> None:
    there = os.statvfs(folder)
    # The database is there twice for a moment.
    if there.f_bavail * there.f_frsize < 2 * size:
        raise StorageError(str(folder), f"{2 * size} bytes are needed here for a moment", passing=True)


def _give(state: Path) -> None:
    """What root restored belongs to whom the directory belongs to: the daemon."""
    if os.geteuid() == 0:
        owner = state.stat()
        for path in (state / "blobs", *state.iterdir(), *(state / "blobs").iterdir()):
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


# -- the archive -------------------------------------------------------------------------------------------------


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    return info.tobuf(tarfile.GNU_FORMAT, "ascii", "strict")


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK)


def _parse(block: bytes) -> tuple[str, int]:
    """Name and size of the next member: a plain file that this program wrote, under a name that it gives."""
    try:
        info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        if _NAMES.fullmatch(info.name) and info.size >= 0 and _header(info.name, info.size) == block:
            return info.name, info.size
    except (tarfile.HeaderError, ValueError):
        pass
    raise RemoteProtocolError(Reason.WRONG_TYPE, "no backup, or a damaged one")


def _names(name: str) -> dict[str, str]:
    match = _NAMES.fullmatch(name)
    return {} if match is None else match.groupdict()


def _copy(source: BinaryIO, target: BinaryIO | None, size: int) -> str:
    """Copy so many bytes; their sha256 in hex. Fewer have another."""
    digest = sha256()
    while size > 0 and (piece := source.read(min(size, _READ))):
        digest.update(piece)
        if target is not None:
            target.write(piece)
        size -= len(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    """A folder for what is not finished; what an earlier crash left in it goes first."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700)
    try:
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _guarded(path: Path, *ours: Path) -> Iterator[None]:
    """Say of errors at files of `ours`, which people do not know, that they are at `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and any(Path(error.filename).is_relative_to(each) for each in ours):
            error.filename = str(path)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
            raise StorageError.of(error.filename or path, error) from error
        raise
