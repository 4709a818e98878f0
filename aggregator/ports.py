"""What the aggregator's service needs remembered: two ports, and the rows that pass through them.

`Store` holds rows that become durable together, `Blobs` holds bytes under their sha256. One implementation of each is
here (aggregator.store, aggregator.blobs); others may follow behind the same ports. Both raise StorageError where the
medium fails, having changed nothing, so that the same call can be made again.

This module decides nothing and must never import what an implementation is made of.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

from shared.errors import LocalProtocolError
from shared.messages import Metrics, ReleaseMessage, Signed

Bytes = bytes | bytearray | memoryview
"""Bytes as they came; a port reads them before it returns and keeps no reference."""

Phase = Literal["open", "closing"]
"""A round that is not over."""
Ending = Literal["released", "rejected_by_gate", "superseded", "stopped", "finished"]
"""The one way in which a round ended."""
TaskState = Literal["active", "paused", "stopped"]
"""What the operator wants of a task."""

PHASES: frozenset[str] = frozenset(get_args(Phase))
ENDINGS: frozenset[str] = frozenset(get_args(Ending))
TASK_STATES: frozenset[str] = frozenset(get_args(TaskState))


class BlobLost(LocalProtocolError):
    """Bytes that were stored are gone or damaged."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """One opened update. `head` are the bytes of its UpdateHead, `body` the sha256 of its ciphertext in the blobs.

    `outcome` is `accepted`, or `rejected` with a `reason`; a rejected one has no body, no numbers and no seq.
    """

    task: str
    manifest_version: int
    origin_round: int
    device: str
    collected_in: int
    head_digest: bytes
    seq: int
    weight: float
    examples: int
    holdout: int
    metrics: Metrics
    head: bytes
    body: bytes
    at: float
    outcome: str = "accepted"
    reason: str = ""
    shard: int = 0


@dataclass(frozen=True, slots=True)
class StoredRound:
    """A round as it stands in the store."""

    number: int
    state: str
    offer: Signed
    extensions: int
    opened: float


@dataclass(frozen=True, slots=True)
class StoredRelease:
    """A release as it stands in the store. Times are Unix seconds."""

    task: str
    manifest_version: int
    number: int
    signed: Signed
    weights: bytes
    """Name (sha256) of its weights; the blobs hold them only while they are in use."""
    created: int
    replaced_at: int | None
    """None for the newest of its task."""
    withdrawn_at: int | None
    """None while its chunks are retained on the broker."""
    restores: int | None
    """The number of the release whose weights it brought back."""


@dataclass(frozen=True, slots=True)
class StoredTask:
    """The newest of a task: manifest, release, round, and that round's contributions in the order of the fold."""

    name: str
    manifest_version: int
    manifest: Signed
    release: Signed
    round: StoredRound | None
    contributions: tuple[Contribution, ...]
    rejected: tuple[Contribution, ...] = ()
    """Devices whose only update to that round did not count."""
    state: TaskState = "active"
    restored: bool = False
    """It comes from a backup: the broker may know more, and is asked before anything is published."""


class Store(Protocol):
    """Rows. Every change happens inside `transaction`; the numbers of a round and a release are given once."""

    def transaction(self) -> AbstractContextManager[None]:
        """Everything inside becomes durable together, or not at all: then the same may be tried again."""

    def close(self) -> None:
        """Let everything go."""

    # -- writing, inside a transaction --

    def adopt(self, task: str, manifest_version: int, message: ReleaseMessage, graphs: tuple[bytes, bytes]) -> None:
        """A manifest with the names (sha256) of its graphs in the blobs; again is nothing."""

    def add_release(
        self,
        task: str,
        manifest_version: int,
        number: int,
        signed: Signed,
        weights: bytes,
        now: float,
        restores: int | None = None,
    ) -> None:
        """A release, which replaces the newest of its task."""

    def mark_withdrawn(self, task: str, manifest_version: int, number: int, now: float) -> None:
        """The chunks of a release are no longer retained on the broker."""

    def forget_releases(self, task: str, keep: int) -> int:
        """Let go of the rows of withdrawn releases, but for the newest `keep` of the task; returns how many."""

    def open_round(self, task: str, manifest_version: int, number: int, offer: Signed, opened: float) -> None:
        """A new open round with its first offer."""

    def revise_round(
        self, task: str, manifest_version: int, number: int, state: str | None, offer: Signed, extensions: int
    ) -> None:
        """A re-issued offer and the state that goes with it; None leaves the state as it is."""

    def end_round(self, task: str, manifest_version: int, number: int, how: str, now: float) -> None:
        """The one way in which a round ended (an Ending)."""

    def contribute(self, rows: Sequence[Contribution]) -> set[bytes]:
        """Record contributions, rejected ones too; returns the head digests of those that were new: only these count.

        A device has one row a round, so a rejected one takes its place.
        """

    def set_task_state(self, task: str, state: TaskState) -> None:
        """What the operator wants of a task."""

    def set_restored(self, task: str, restored: bool) -> None:
        """Whether a task still waits for what the broker knows of it."""

    def prune(self, now: float, most: int = 10_000) -> int:
        """Forget rows of rounds that ended more than 400 days ago; returns how many, at most `most`."""

    # -- reading --

    def tasks(self) -> list[StoredTask]:
        """The newest state of every task, by name."""

    def task_state(self, task: str) -> TaskState:
        """What the operator wants of a task; `active` for one that is not known."""

    def model(self, task: str, manifest_version: int) -> tuple[bytes, bytes, bytes]:
        """Names (sha256) of the train graph, eval graph and newest weights of a manifest."""

    def release(self, task: str, manifest_version: int, number: int) -> StoredRelease | None:
        """A release by its number."""

    def releases(self, task: str, manifest_version: int, most: int) -> list[StoredRelease]:
        """The newest `most` releases of a manifest, the newest first."""

    def retained(self, task: str) -> list[StoredRelease]:
        """The releases of a task that are not withdrawn, of any manifest, the newest first."""

    def contributions(self, task: str, manifest_version: int, number: int) -> list[Contribution]:
        """What counts of a round, in the order of the fold."""

    def recall(self, task: str, manifest_version: int, origin_round: int, device: str) -> Contribution | None:
        """What a device's update to a round became, if it had one."""

    def recall_head(self, task: str, origin_round: int, device: str, head_digest: bytes) -> Contribution | None:
        """What this very head of a device became, under any manifest."""

    def weights_in_use(self, keep: int) -> set[bytes]:
        """Names of the weights of the newest `keep` releases of each task's newest manifest."""

    def weights_spent(self, task: str, keep: int) -> set[bytes]:
        """Names of weights that fell out of use lately: of the `keep` releases before those that are kept."""


class Blobs(Protocol):
    """Content-addressed bytes. What is forgotten may come back after a crash; the service sweeps when it starts."""

    def put(self, data: Bytes) -> bytes:
        """Store bytes that stay long, durably; returns their sha256. Storing them twice is storing them once."""

    def put_all(self, pieces: Mapping[bytes, Bytes]) -> None:
        """Store bytes that go soon, together and durably, by the sha256 that the caller has found them to have."""

    def put_file(self, path: Path, name: bytes) -> None:
        """Take over a finished file, durably, by the sha256 that the caller has found it to have; `path` is gone."""

    def get(self, name: bytes) -> bytes:
        """The bytes of that sha256, else BlobLost."""

    def read(self, name: bytes, offset: int, length: int) -> bytes:
        """A piece of them, shorter at the end, else BlobLost. Only whoever knows the piece's own hash can trust it."""

    def size(self, name: bytes) -> int:
        """How many bytes they are, else BlobLost."""

    def delete(self, name: bytes) -> None:
        """Forget bytes; those that are not there are forgotten already."""

    def names(self) -> list[bytes]:
        """All that is stored."""

    def close(self) -> None:
        """Let everything go."""
