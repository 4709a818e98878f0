"""What a device must remember across reboots: the highest positions it accepted, and the newest release's files.

One folder a task. Graphs, weights and signed records are files named by their sha256; `state` names them and holds the
positions, is written last and replaced whole. So a crash at any point leaves the old state or the new one, never half.
"""

import contextlib
import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, structs

from shared import wire
from shared.errors import ConfigError, RemoteProtocolError
from shared.files import write_durably
from shared.messages import Digest, First, Release, ReleaseMessage, Signed, TaskManifest, Uint, Wire
from shared.topics import is_name
from shared.trust import Position

_STATE_MAX = 1 << 16


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


class Store:
    """The state directory of the agent; used by the owner thread alone."""

    def __init__(self, directory: Path) -> None:
        """Open or create it; ConfigError if that cannot be done."""
        self._tasks, self.outbox = directory / "tasks", directory / "outbox"
        try:
            for folder in (directory, self._tasks, self.outbox):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for left in self.outbox.iterdir():
                left.unlink()
        except OSError as error:
            raise ConfigError(str(directory), "device.state_dir", f"cannot be used: {error.strerror}") from None
        self._states: dict[str, TaskState] = {}

    def load(self) -> list[Kept]:
        """Every task, by name. A damaged state is as good as none: the broker has the newest release."""
        found = []
        for folder in sorted(self._tasks.iterdir()):
            if is_name(folder.name) and (folder / "state").is_file():
                with contextlib.suppress(RemoteProtocolError, OSError):
                    found.append(self._read(folder))
        return found

    def keep_release(self, task: str, message: ReleaseMessage, manifest: Position, release: Position) -> None:
        """Make a release the newest of its task."""
        if message.graphs is None or message.weights is None:
            raise ValueError("a release without its parts is never accepted")
        folder = self._tasks / task
        folder.mkdir(mode=0o700, exist_ok=True)
        state = structs.replace(
            self._state(task),
            manifest=_put(folder, wire.pack(message.manifest)),
            release=_put(folder, wire.pack(message.release)),
            train_graph=_put(folder, message.graphs.train),
            eval_graph=_put(folder, message.graphs.eval),
            weights=_put(folder, message.weights),
            release_position=_rank(release),
            manifest_position=_rank(manifest),
        )
        self._write(task, state)
        used = {name.hex() for name in (state.manifest, state.release, state.train_graph, state.eval_graph) if name}
        used |= {state.weights.hex()} if state.weights else set()
        for path in folder.iterdir():
            if path.name != "state" and path.name not in used:
                path.unlink()

    def keep_offer(self, task: str, position: Position) -> None:
        """Remember how far this task's offers have come."""
        self._write(task, structs.replace(self._state(task), offer_position=_rank(position)))

    def keep_worked(self, task: str, position: tuple[int, int]) -> None:
        """Remember the newest round that an update was made for."""
        self._write(task, structs.replace(self._state(task), worked=list(position)))

    def forget(self, task: str) -> None:
        """Begin a task anew: nothing that was accepted of it binds any more."""
        self._states.pop(task, None)
        folder = self._tasks / task
        # First the state: files that no state names are nothing, should the power go in between.
        (folder / "state").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def files(self, task: str, manifest: TaskManifest, release: Release) -> tuple[Path, Path, Path]:
        """(train graph, eval graph, weights) of an accepted release."""
        folder = self._tasks / task
        names = (manifest.train_graph, manifest.eval_graph, release.weights.sha256)
        train, evaluate, weights = (folder / name.hex() for name in names)
        return train, evaluate, weights

    def _state(self, task: str) -> TaskState:
        return self._states.get(task) or TaskState(v=1)

    def _read(self, folder: Path) -> Kept:
        state = wire.unpack((folder / "state").read_bytes(), TaskState, _STATE_MAX)
        self._states[folder.name] = state
        manifest, release = _get(folder, state.manifest), _get(folder, state.release)
        # A release counts as stored only if every byte of it is still what was hashed.
        whole = all(_get(folder, name) is not None for name in (state.train_graph, state.eval_graph, state.weights))
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
        folder.mkdir(mode=0o700, exist_ok=True)
        write_durably(folder / "state", wire.pack(state))
        self._states[task] = state


def _put(folder: Path, data: bytes) -> bytes:
    name = sha256(data).digest()
    # What lies there may be damaged; then this is what repairs it.
    if _get(folder, name) is None:
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


def _rank(position: Position) -> Rank:
    return Rank(rank=list(position.rank), digest=position.digest)


def _position(rank: Rank | None) -> Position | None:
    return None if rank is None else Position(tuple(rank.rank), rank.digest)
