"""What the aggregator must remember: tasks, releases, rounds and contributions in SQLite, bytes in a directory.

SQL is written with SQLAlchemy Core and holds nothing that only SQLite knows. One connection, used by the owner thread.
Blobs are named by their sha256, written whole (temporary file, fsync, rename) and checked when read.
The private keys of rounds are files of their own, in no database and so in no backup of one.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import SQLAlchemyError

from shared import wire
from shared.errors import ConfigError, LocalProtocolError
from shared.files import write_durably
from shared.messages import Metrics, ReleaseMessage, Signed

SCHEMA_VERSION = 1

_WRITERS = 4
"""Threads that write bodies; measured on a virtual disk: 3 ms for each file of 4 MB, with one thread 8."""

_meta = sa.MetaData()
_schema = sa.Table("schema_version", _meta, sa.Column("version", sa.Integer, primary_key=True))
_manifests = sa.Table(
    "manifests",
    _meta,
    sa.Column("task", sa.String, primary_key=True),
    sa.Column("manifest_version", sa.BigInteger, primary_key=True),
    sa.Column("signed", sa.LargeBinary, nullable=False),
    sa.Column("train_graph", sa.LargeBinary, nullable=False),
    sa.Column("eval_graph", sa.LargeBinary, nullable=False),
)
_releases = sa.Table(
    "releases",
    _meta,
    sa.Column("task", sa.String, primary_key=True),
    sa.Column("manifest_version", sa.BigInteger, primary_key=True),
    sa.Column("number", sa.BigInteger, primary_key=True),
    sa.Column("signed", sa.LargeBinary, nullable=False),
    sa.Column("weights", sa.LargeBinary, nullable=False),
    sa.Column("created", sa.BigInteger, nullable=False),
)
_rounds = sa.Table(
    "rounds",
    _meta,
    sa.Column("task", sa.String, primary_key=True),
    sa.Column("manifest_version", sa.BigInteger, primary_key=True),
    sa.Column("round", sa.BigInteger, primary_key=True),
    # open, closing; then how it ended: released, superseded or rejected_by_gate
    sa.Column("state", sa.String, nullable=False),
    sa.Column("offer", sa.LargeBinary, nullable=False),
    sa.Column("extensions", sa.Integer, nullable=False),
    sa.Column("opened", sa.Float, nullable=False),
    sa.Column("ended", sa.Float),
)
_contributions = sa.Table(
    "contributions",
    _meta,
    sa.Column("task", sa.String, primary_key=True),
    sa.Column("manifest_version", sa.BigInteger, primary_key=True),
    sa.Column("origin_round", sa.BigInteger, primary_key=True),
    sa.Column("device", sa.String, primary_key=True),
    sa.Column("collected_in", sa.BigInteger, nullable=False),
    sa.Column("shard", sa.Integer, nullable=False),
    sa.Column("head_digest", sa.LargeBinary, nullable=False),
    sa.Column("outcome", sa.String, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("weight", sa.Float, nullable=False),
    sa.Column("examples", sa.BigInteger, nullable=False),
    sa.Column("holdout", sa.BigInteger, nullable=False),
    sa.Column("metrics", sa.LargeBinary, nullable=False),
    sa.Column("head", sa.LargeBinary, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Contribution:
    """One accepted update. `head` are the bytes of its UpdateHead, `body` the sha256 of its ciphertext in the blobs."""

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
class StoredTask:
    """The newest of a task: manifest, release, round, and that round's contributions in the order of the fold."""

    name: str
    manifest_version: int
    manifest: Signed
    release: Signed
    round: StoredRound | None
    contributions: tuple[Contribution, ...]


class Store:
    """The database. Every change happens inside `transaction`."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open or create the database file; ConfigError if it is not one of ours, or of a later version."""
        if read_only and not path.exists():
            raise ConfigError(str(path), "", "no database here: has the aggregator run with this state.directory?")
        mode = {"mode": "ro" if read_only else "rwc", "uri": "true"}
        url = sa.URL.create("sqlite", database=path.resolve().as_uri(), query=mode)
        self._engine = sa.create_engine(url, poolclass=sa.pool.StaticPool, connect_args={"check_same_thread": False})
        try:
            self._connection = self._engine.connect()
            if not read_only:
                self._connection.exec_driver_sql("PRAGMA journal_mode=WAL")
                self._connection.exec_driver_sql("PRAGMA synchronous=FULL")
                self._connection.commit()
                with self._connection.begin():
                    _meta.create_all(self._connection)
                    if self._connection.scalar(sa.select(_schema.c.version)) is None:
                        self._connection.execute(_schema.insert().values(version=SCHEMA_VERSION))
            version = self._connection.scalar(sa.select(_schema.c.version))
            self._connection.rollback()
        except SQLAlchemyError as error:
            raise ConfigError(str(path), "", f"is not a usable database: {_cause(error)}") from None
        if version != SCHEMA_VERSION:
            raise ConfigError(str(path), "", f"has schema {version}, this program knows {SCHEMA_VERSION}: upgrade it")

    def close(self) -> None:
        """Let the file go."""
        self._connection.close()
        self._engine.dispose()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside becomes durable together, or not at all."""
        try:
            with self._connection.begin():
                yield
        except SQLAlchemyError as error:
            raise LocalProtocolError(f"the database failed: {_cause(error)}") from error

    # -- writing, inside a transaction --

    def adopt(self, task: str, manifest_version: int, message: ReleaseMessage, graphs: tuple[bytes, bytes]) -> None:
        """A manifest with the names (sha256) of its graphs in the blobs."""
        values = {"signed": wire.pack(message.manifest), "train_graph": graphs[0], "eval_graph": graphs[1]}
        row = {"task": task, "manifest_version": manifest_version, **values}
        self._connection.execute(insert(_manifests).values(row).on_conflict_do_nothing())

    def add_release(
        self, task: str, manifest_version: int, number: int, signed: Signed, weights: bytes, now: float
    ) -> None:
        """A release; the same number twice is our bug."""
        self._connection.execute(
            _releases.insert().values(
                task=task,
                manifest_version=manifest_version,
                number=number,
                signed=wire.pack(signed),
                weights=weights,
                created=int(now),
            )
        )

    def open_round(self, task: str, manifest_version: int, number: int, offer: Signed, opened: float) -> None:
        """A new open round with its first offer."""
        row = {"task": task, "manifest_version": manifest_version, "round": number, "state": "open"}
        self._connection.execute(_rounds.insert().values(**row, offer=wire.pack(offer), extensions=0, opened=opened))

    def revise_round(
        self, task: str, manifest_version: int, number: int, state: str | None, offer: Signed, extensions: int
    ) -> None:
        """A re-issued offer and the state that goes with it; None leaves the state as it is."""
        changed = {"offer": wire.pack(offer), "extensions": extensions} | ({"state": state} if state else {})
        self._connection.execute(_rounds.update().where(*_round(task, manifest_version, number)).values(changed))

    def end_round(self, task: str, manifest_version: int, number: int, how: str, now: float) -> None:
        """The one way in which a round ended."""
        self._connection.execute(
            _rounds.update().where(*_round(task, manifest_version, number)).values(state=how, ended=now)
        )

    def contribute(self, rows: Sequence[Contribution]) -> set[bytes]:
        """Record contributions; returns the head digests of those that were new: only these count."""
        if not rows:
            return set()
        values = [
            {
                "task": row.task,
                "manifest_version": row.manifest_version,
                "origin_round": row.origin_round,
                "device": row.device,
                "collected_in": row.collected_in,
                "shard": row.shard,
                "head_digest": row.head_digest,
                "outcome": row.outcome,
                "seq": row.seq,
                "weight": row.weight,
                "examples": row.examples,
                "holdout": row.holdout,
                "metrics": wire.pack(row.metrics),
                "head": row.head,
                "body": row.body,
                "at": row.at,
            }
            for row in rows
        ]
        statement = insert(_contributions).values(values).on_conflict_do_nothing()
        returned = self._connection.execute(statement.returning(_contributions.c.head_digest))
        return {digest for (digest,) in returned}

    # -- reading --

    def tasks(self) -> list[StoredTask]:
        """The newest state of every task, by name."""
        newest = sa.select(_manifests.c.task, sa.func.max(_manifests.c.manifest_version)).group_by(_manifests.c.task)
        with self._reading():
            found = self._connection.execute(newest.order_by(_manifests.c.task)).all()
            return [self._task(task, version) for task, version in found]

    def model(self, task: str, manifest_version: int) -> tuple[bytes, bytes, bytes]:
        """Names (sha256) of the train graph, eval graph and newest weights of a task."""
        with self._reading():
            graphs = self._connection.execute(
                sa.select(_manifests.c.train_graph, _manifests.c.eval_graph).where(
                    _manifests.c.task == task, _manifests.c.manifest_version == manifest_version
                )
            ).one()
            weights = self._connection.scalar(
                sa.select(_releases.c.weights)
                .where(_releases.c.task == task, _releases.c.manifest_version == manifest_version)
                .order_by(_releases.c.number.desc())
                .limit(1)
            )
        return graphs.train_graph, graphs.eval_graph, weights or b""

    def contributions(self, task: str, manifest_version: int, number: int) -> list[Contribution]:
        """What was collected in a round, in the order of the fold."""
        query = (
            sa.select(_contributions)
            .where(
                _contributions.c.task == task,
                _contributions.c.manifest_version == manifest_version,
                _contributions.c.collected_in == number,
            )
            .order_by(_contributions.c.seq)
        )
        with self._reading():
            return [_contribution(row) for row in self._connection.execute(query)]

    def recall(self, task: str, manifest_version: int, origin_round: int, device: str) -> Contribution | None:
        """What a device contributed to a round, if anything."""
        query = sa.select(_contributions).where(
            _contributions.c.task == task,
            _contributions.c.manifest_version == manifest_version,
            _contributions.c.origin_round == origin_round,
            _contributions.c.device == device,
        )
        with self._reading():
            row = self._connection.execute(query).one_or_none()
        return None if row is None else _contribution(row)

    def weights_in_use(self) -> set[bytes]:
        """Names of the weights that the newest release of any manifest has."""
        key = (_releases.c.task, _releases.c.manifest_version)
        newest = sa.select(*key, sa.func.max(_releases.c.number)).group_by(*key)
        query = sa.select(_releases.c.weights).where(sa.tuple_(*key, _releases.c.number).in_(newest))
        with self._reading():
            return set(self._connection.scalars(query))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        outer = self._connection.in_transaction()
        try:
            yield
        except SQLAlchemyError as error:
            raise LocalProtocolError(f"the database failed: {_cause(error)}") from error
        finally:
            if not outer:
                self._connection.rollback()

    def _task(self, task: str, version: int) -> StoredTask:
        manifest = self._connection.scalar(
            sa.select(_manifests.c.signed).where(_manifests.c.task == task, _manifests.c.manifest_version == version)
        )
        release = self._connection.scalar(
            sa.select(_releases.c.signed)
            .where(_releases.c.task == task, _releases.c.manifest_version == version)
            .order_by(_releases.c.number.desc())
            .limit(1)
        )
        row = self._connection.execute(
            sa.select(_rounds)
            .where(_rounds.c.task == task, _rounds.c.manifest_version == version)
            .order_by(_rounds.c.round.desc())
            .limit(1)
        ).one_or_none()
        if manifest is None or release is None:
            raise LocalProtocolError(f"task {task} has a manifest without a release in the database")
        found = None
        if row is not None:
            found = StoredRound(row.round, row.state, wire.unpack(row.offer, Signed), row.extensions, row.opened)
        rows = tuple(self.contributions(task, version, found.number)) if found is not None else ()
        return StoredTask(task, version, wire.unpack(manifest, Signed), wire.unpack(release, Signed), found, rows)


class BlobLost(LocalProtocolError):
    """Bytes that were stored are gone or damaged."""


class Blobs:
    """Content-addressed files below one directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        for left in directory.glob(".*.new"):
            left.unlink()  # a crash came while it was written
        # A disk syncs several files at once in little more than the time of one.
        self._writers = ThreadPoolExecutor(_WRITERS, "blobs")

    def put(self, data: bytes | bytearray | memoryview) -> bytes:
        """Store bytes durably; returns their sha256. Storing them twice is storing them once."""
        name = hashlib.sha256(data).digest()
        self._keep(name, data)
        return name

    def put_all(self, pieces: Mapping[bytes, bytes]) -> None:
        """Store several bytes durably, by the sha256 that the caller has found them to have."""
        list(self._writers.map(self._keep, pieces, pieces.values()))

    def get(self, name: bytes) -> bytes:
        """The bytes of that sha256, else BlobLost."""
        try:
            data = self._path(name).read_bytes()
        except OSError as error:
            raise BlobLost(f"blob {name.hex()} cannot be read: {error.strerror}") from None
        if hashlib.sha256(data).digest() != name:
            raise BlobLost(f"blob {name.hex()} is damaged on disk")
        return data

    def delete(self, name: bytes) -> None:
        """Forget bytes; those that are not there are forgotten already."""
        self._path(name).unlink(missing_ok=True)

    def names(self) -> list[bytes]:
        """All that is stored."""
        return [bytes.fromhex(path.name) for path in self._directory.iterdir() if len(path.name) == 64]

    def _keep(self, name: bytes, data: bytes | bytearray | memoryview) -> None:
        path = self._path(name)
        # What lies there may be damaged; then this is what repairs it.
        if not (path.exists() and path.read_bytes() == data):
            write_durably(path, data)

    def _path(self, name: bytes) -> Path:
        return self._directory / name.hex()


def _round(task: str, manifest_version: int, number: int) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        _rounds.c.task == task,
        _rounds.c.manifest_version == manifest_version,
        _rounds.c.round == number,
    )


def _contribution(row: sa.Row[tuple[object, ...]]) -> Contribution:
    values = dict(row._mapping)
    return Contribution(**{**values, "metrics": wire.unpack(values["metrics"], Metrics)})


def _cause(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0]
