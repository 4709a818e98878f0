"""What a device must remember across reboots: the highest positions it accepted, and the newest release's files.

One folder a task. Graphs, weights and signed records are files named by their sha256; `state` names them and holds the
positions, is written last and replaced whole. So a crash at any point leaves the old state or the new one, never half.
The weights of the release before stay until the next one: a rollback most often wants them.

What a job is lies in `jobs/<id>` and its checkpoint in `jobs/<id>.checkpoint`, until it is done or dropped. When a
training ended last lies in `trained`, where the owner asks for spacing.

Weights that come in chunks are gathered in `spool/<task>.<sha256>` and move to their place when they are whole; they
are never in memory. Every method that writes raises StorageError when the disk refuses, and may be called again.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, structs

from edge_agent.jobs import LeftJob
from shared import wire
from shared.errors import ConfigError, RemoteProtocolError, StorageError
from shared.files import write_durably
from shared.messages import BlobRef, Digest, First, Release, ReleaseMessage, Signed, TaskManifest, Uint, Wire
from shared.spool import Spool
from shared.topics import is_name
from shared.trust import Position

_STATE_MAX = 1 << 16
_RESERVE = 16 << 20
"""Bytes that a download leaves free."""
_FORGOTTEN = 30 * 86_400
"""Seconds after which a download that was not gone on with is nothing any more: its task is not offered."""
_SMALL = 32
_READ = 1 << 20
"""Bytes read at a time."""


class Rank(Wire, frozen=True):
    """A Position, as stored."""

    rank: Annotated[list[Uint], Meta(min_length=1, max_length=3)]
    digest: Digest


class TaskState(Wire, frozen=True):
    """What is kept of one task; the digests name files beside it."""

    v: First
    manifest: Digest | None = None
    release: Digest | None = None
    train_graph: Digest | None = None
    eval_graph: Digest | None = None
    weights: Digest | None = None
    release_position: Rank | None = None
    manifest_position: Rank | None = None
    offer_position: Rank | None = None
    worked: Annotated[list[Uint], Meta(min_length=2, max_length=2)] = msgspec.field(default_factory=lambda: [0, 0])


@dataclass(frozen=True, slots=True)
class Kept:
    """A task read back: None where nothing (or nothing whole) is stored; positions hold even then."""

    name: str
    manifest: Signed | None
    release: Signed | None
    release_position: Position | None
    manifest_position: Position | None
    offer_position: Position | None
    worked: tuple[int, int]


def held(directory: Path) -> list[TaskManifest]:
    """The manifests of the tasks in a state directory that may be another process's; nothing is changed, or OSError."""
    found = []
    tasks = directory / "tasks"
    for folder in sorted(tasks.iterdir()) if tasks.exists() else []:
        with contextlib.suppress(RemoteProtocolError, FileNotFoundError):
            state = wire.unpack((folder / "state").read_bytes(), TaskState, _STATE_MAX)
            if (signed := _get(folder, state.manifest)) is not None:
                found.append(wire.unpack(wire.unpack(signed, Signed).payload, TaskManifest))
    return found


class Store:
    """The state directory of the agent; used by the owner thread alone."""

    def __init__(self, directory: Path) -> None:
        """Open or create it; ConfigError if that cannot be done."""
        self._tasks, self._spools, self.outbox = directory / "tasks", directory / "spool", directory / "outbox"
        self._jobs, self._trained = directory / "jobs", directory / "trained"
        try:
            for folder in (directory, self._tasks, self._spools, self.outbox, self._jobs):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(str(directory), "device.state_dir", f"cannot be used: {error.strerror}") from None
        self._states: dict[str, TaskState] = {}
        self._spool: Spool | None = None

    def load(self) -> list[Kept]:
        """Every task, by name. A damaged state is as good as none: the broker has the newest release."""
        found = []
        for folder in sorted(self._tasks.iterdir()):
            if is_name(folder.name) and (folder / "state").is_file():
                with contextlib.suppress(RemoteProtocolError, OSError):
                    found.append(self._read(folder))
        return found

    def keep_release(self, task: str, message: ReleaseMessage, manifest: Position, release: Position) -> None:
        """Make a release the newest of its task; weights that came in chunks lie in their place already."""
        if message.graphs is None:
            raise ValueError("a release without its graphs is never accepted")
        blob = wire.unpack(message.release.payload, Release).weights
        if message.weights is None and not blob.chunks:
            raise ValueError("a release without its weights is never accepted")
        folder, before = self._tasks / task, self._state(task)
        with _guarded(folder):
            folder.mkdir(mode=0o700, exist_ok=True)
            if message.weights is not None:
                _put(folder, message.weights)
            elif (folder / blob.sha256.hex()).stat().st_size != blob.size:
                raise FileNotFoundError(2, "the weights are not whole any more")
            state = structs.replace(
                before,
                manifest=_put(folder, wire.pack(message.manifest)),
                release=_put(folder, wire.pack(message.release)),
                train_graph=_put(folder, message.graphs.train),
                eval_graph=_put(folder, message.graphs.eval),
                weights=blob.sha256,
                release_position=_rank(release),
                manifest_position=_rank(manifest),
            )
        self._write(task, state)
        self._sweep(task, before.weights)

    def keep_offer(self, task: str, position: Position) -> None:
        """Remember how far this task's offers have come."""
        self._write(task, structs.replace(self._state(task), offer_position=_rank(position)))

    def keep_worked(self, task: str, position: tuple[int, int]) -> None:
        """Remember the newest round of which an update was answered."""
        state = self._state(task)
        self._write(task, structs.replace(state, worked=max(state.worked, list(position))))

    def forget(self, task: str) -> None:
        """Begin a task anew: nothing that was accepted of it binds any more."""
        folder = self._tasks / task
        with _guarded(folder):
            # First the state: files that no state names are nothing, should the power go in between.
            (folder / "state").unlink(missing_ok=True)
        self._states.pop(task, None)
        shutil.rmtree(folder, ignore_errors=True)
        self._discard_spools(task)

    # -- jobs --

    def keep_job(self, job: LeftJob) -> None:
        """Remember what a job is before it begins."""
        with _guarded(self._jobs):
            write_durably(self._jobs / job.id, wire.pack(job))

    def drop_job(self, id: str) -> None:
        """Forget a job and its checkpoint."""
        for path in (self._jobs / id, self.checkpoint(id)):
            with contextlib.suppress(OSError):  # it is tried again at the next start
                path.unlink(missing_ok=True)

    def checkpoint(self, id: str) -> Path:
        """Where the trainer keeps this job's checkpoint."""
        return self._jobs / f"{id}.checkpoint"

    def jobs(self) -> list[LeftJob]:
        """The jobs that were begun and never dropped, newest first; what belongs to none of them is deleted."""
        found: list[tuple[int, LeftJob]] = []
        with contextlib.suppress(OSError):
            for path in self._jobs.iterdir():
                with contextlib.suppress(RemoteProtocolError, OSError):
                    if path.suffix != ".checkpoint":
                        job = wire.unpack(path.read_bytes(), LeftJob, _STATE_MAX)
                        found += [(path.stat().st_mtime_ns, job)] if job.id == path.name else []
            known = {name for _, job in found for name in (job.id, self.checkpoint(job.id).name)}
            for path in list(self._jobs.iterdir()):
                if path.name not in known:
                    path.unlink()
        return [job for _, job in sorted(found, key=lambda each: each[0], reverse=True)]

    # -- spacing --

    def keep_trained(self, utc: float) -> None:
        """Remember when a training ended, in UTC seconds."""
        with _guarded(self._trained):
            write_durably(self._trained, f"{int(utc)}\n".encode())

    def trained(self) -> float | None:
        """When one ended last; None: never. A record that is damaged is one of a moment that is yet to come."""
        try:
            digits = self._trained.read_bytes()[:_SMALL].strip()
        except FileNotFoundError:
            return None
        except OSError:
            return math.inf
        return float(digits) if digits.isdigit() else math.inf

    # -- weights in chunks --

    def open_spool(self, task: str, blob: BlobRef) -> list[int] | None:
        """The chunks of a blob that are not on the disk; None: it lies whole where the trainer looks."""
        target, path = self._tasks / task / blob.sha256.hex(), self._spools / f"{task}.{blob.sha256.hex()}"
        self._spool = None
        if _whole(target, blob.sha256):
            self._discard_spools(task)
            return None
        self._discard_spools(task, but=path)
        if target.is_file() and not path.exists():
            # It was damaged: what is right in it need not come again.
            with contextlib.suppress(OSError):
                os.replace(target, path)
        spool = Spool(path, blob, _RESERVE)
        try:
            missing = spool.missing()
        except StorageError:
            # Weights that nothing but a rollback would want make room.
            self._sweep(task)
            missing = spool.missing()
        self._spool = spool
        return missing

    def write_chunk(self, task: str, blob: bytes, index: int, data: bytes | bytearray) -> None:
        """Put a verified chunk into the file that is open for this blob; after a failure there is none."""
        spool = self._opened(task, blob)
        if spool is None:
            return
        try:
            spool.write(index, data)
        except StorageError:
            self._spool = None
            raise

    def finish_spool(self, task: str, blob: bytes) -> None:
        """Move a whole blob where the trainer looks. RemoteProtocolError: it is not what it was signed for."""
        spool, folder = self._opened(task, blob), self._tasks / task
        self._spool = None
        if spool is None:
            raise StorageError(str(self._spools), "the download was given up", passing=True)
        with _guarded(folder):
            folder.mkdir(mode=0o700, exist_ok=True)
        spool.finish(folder / blob.hex())

    def sweep_spools(self, now: float) -> None:
        """Give back the room of downloads of which nothing came for a month; `now` is Unix time."""
        with contextlib.suppress(OSError):
            for path in list(self._spools.iterdir()):
                if path.stat().st_mtime < now - _FORGOTTEN:
                    path.unlink()

    def drop_spool(self, task: str) -> None:
        """Give back the room of a download that nobody wants any more."""
        if self._spool is not None and self._spool.path.name.startswith(f"{task}."):
            self._spool = None
        self._discard_spools(task)

    def _opened(self, task: str, blob: bytes) -> Spool | None:
        path = self._spools / f"{task}.{blob.hex()}"
        return self._spool if self._spool is not None and self._spool.path == path else None

    def _discard_spools(self, task: str, but: Path | None = None) -> None:
        for path in self._spools.glob(f"{task}.*"):
            if path != but:
                with contextlib.suppress(OSError):
                    path.unlink()

    # -- files --

    def files(self, task: str, manifest: TaskManifest, release: Release) -> tuple[Path, Path, Path]:
        """(train graph, eval graph, weights) of an accepted release."""
        folder = self._tasks / task
        names = (manifest.train_graph, manifest.eval_graph, release.weights.sha256)
        train, evaluate, weights = (folder / name.hex() for name in names)
        return train, evaluate, weights

    def _sweep(self, task: str, *also: bytes | None) -> None:
        """Delete what the state does not name, but for these."""
        state = self._state(task)
        named = (state.manifest, state.release, state.train_graph, state.eval_graph, state.weights, *also)
        used = {"state"} | {name.hex() for name in named if name is not None}
        with contextlib.suppress(OSError):
            for path in list((self._tasks / task).iterdir()):
                if path.name not in used:
                    path.unlink()

    def _state(self, task: str) -> TaskState:
        return self._states.get(task) or TaskState(v=1)

    def _read(self, folder: Path) -> Kept:
        state = wire.unpack((folder / "state").read_bytes(), TaskState, _STATE_MAX)
        self._states[folder.name] = state
        manifest, release = _get(folder, state.manifest), _get(folder, state.release)
        # A release counts as stored only if every byte of it is still what was hashed.
        parts = (state.train_graph, state.eval_graph, state.weights)
        whole = all(name is not None and _whole(folder / name.hex(), name) for name in parts)
        if manifest is None or release is None or not whole:
            manifest = release = None
        return Kept(
            folder.name,
            None if manifest is None else wire.unpack(manifest, Signed),
            None if release is None else wire.unpack(release, Signed),
            _position(state.release_position),
            _position(state.manifest_position),
            _position(state.offer_position),
            (state.worked[0], state.worked[1]),
        )

    def _write(self, task: str, state: TaskState) -> None:
        folder = self._tasks / task
        with _guarded(folder):
            folder.mkdir(mode=0o700, exist_ok=True)
            write_durably(folder / "state", wire.pack(state))
        self._states[task] = state


def _put(folder: Path, data: bytes) -> bytes:
    name = sha256(data).digest()
    # What lies there may be damaged; then this is what repairs it.
    if not _whole(folder / name.hex(), name):
        write_durably(folder / name.hex(), data)
    return name


def _get(folder: Path, name: bytes | None) -> bytes | None:
    if name is None:
        return None
    try:
        data = (folder / name.hex()).read_bytes()
    except OSError:
        return None
    return data if sha256(data).digest() == name else None


def _whole(path: Path, name: bytes) -> bool:
    """Whether a file is what it is named; it may be large, and is never in memory."""
    digest = sha256()
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            while piece := file.read(_READ):
                digest.update(piece)
    except OSError:
        return False
    return digest.digest() == name


@contextlib.contextmanager
def _guarded(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError.of(path, error) from None


def _rank(position: Position) -> Rank:
    return Rank(rank=list(position.rank), digest=position.digest)


def _position(rank: Rank | None) -> Position | None:
    return None if rank is None else Position(tuple(rank.rank), rank.digest)
