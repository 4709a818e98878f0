"""What the aggregator must remember, behind the port Store: tasks, releases, rounds and contributions as rows.

SQL is written with SQLAlchemy Core and holds nothing that only SQLite knows (that is in aggregator.sqlite). One
connection, used by the owner thread. Bytes are named here and kept in the blobs; the private keys of rounds are files
of their own, in no database and so in no backup of one.

An older schema is moved over in one transaction when the database is opened for writing, after a copy of the file was
laid beside it.
"""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as postgres_dialect
from sqlalchemy.dialects import sqlite as sqlite_dialect
from sqlalchemy.exc import SQLAlchemyError

from aggregator import ports, sqlite
from aggregator.ports import (
    ENDINGS,
    PHASES,
    TASK_STATES,
    Contribution,
    StoredRelease,
    StoredRound,
    StoredTask,
    TaskState,
)
from shared import wire
from shared.errors import ConfigError, LocalProtocolError, RemoteProtocolError, StorageError
from shared.messages import Metrics, ReleaseMessage, Signed

SCHEMA_VERSION = 2
REMEMBERED = 400 * 86_400
"""Seconds for which the rows of a round outlive it: who asks later is told `late`, whatever it was told before."""

_meta = sa.MetaData()
_schema = sa.Table("schema_version", _meta, sa.Column("version", sa.Integer, primary_key=True))
_tasks = sa.Table(
    "tasks",
    _meta,
    sa.Column("task", sa.String, primary_key=True),
    sa.Column("state", sa.String, nullable=False),  # a TaskState
    sa.Column("restored", sa.Boolean, nullable=False),
)
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
    sa.Column("replaced_at", sa.BigInteger),
    sa.Column("withdrawn_at", sa.BigInteger),
    sa.Column("restores", sa.BigInteger),
)
_rounds = sa.Table(
    "rounds",
    _meta,
    sa.Column("task", sa.String, primary_key=True),
    sa.Column("manifest_version", sa.BigInteger, primary_key=True),
    sa.Column("round", sa.BigInteger, primary_key=True),
    sa.Column("state", sa.String, nullable=False),  # a Phase, then an Ending
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
    sa.Column("outcome", sa.String, nullable=False),  # accepted or rejected
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("weight", sa.Float, nullable=False),
    sa.Column("examples", sa.BigInteger, nullable=False),
    sa.Column("holdout", sa.BigInteger, nullable=False),
    sa.Column("metrics", sa.LargeBinary, nullable=False),
    sa.Column("head", sa.LargeBinary, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("reason", sa.String, nullable=False, server_default=""),
)
# A year's rounds of a task lie together under the primary key: without this each closing would read them all.
_collected = sa.Index(
    "contributions_collected",
    _contributions.c.task,
    _contributions.c.manifest_version,
    _contributions.c.collected_in,
    _contributions.c.seq,
)

_INSERTS: dict[str, Callable[[sa.Table], sqlite_dialect.Insert | postgres_dialect.Insert]] = {
    "sqlite": sqlite_dialect.insert,
    "postgresql": postgres_dialect.insert,
}
"""ON CONFLICT is the same words in both, but each dialect has an INSERT of its own for it."""


class Store(ports.Store):
    """The database. Every change happens inside `transaction`."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open or create the database file; ConfigError if it is not one of ours, or of a later version."""
        if read_only and not path.exists():
            raise ConfigError(str(path), "", "no database here: has the aggregator run with this state.directory?")
        self._path, self._read_only = path, read_only
        suspect = not read_only and sqlite.begin_use(path)
        self._engine = sqlite.engine(path, read_only=read_only)
        self._insert = _INSERTS[self._engine.dialect.name]
        try:
            self._connection = self._engine.connect()
            if suspect:
                sqlite.check(path, self._connection)
            version = self._version(create=not read_only)
            if version == 1 and not read_only:
                sqlite.copy(path, path.with_name(f"{path.name}.v1"))
                with self._connection.begin():
                    _from_1_to_2(self._connection)
                version = 2
        except (SQLAlchemyError, sqlite3.Error) as error:
            failed = sqlite.failure(path, error)
            if isinstance(failed, ConfigError) or (isinstance(failed, StorageError) and failed.passing):
                raise failed from error
            cause = str(getattr(error, "orig", None) or error).splitlines()[0]
            raise ConfigError(str(path), "", f"is not a usable database: {cause}") from None
        if version < SCHEMA_VERSION:
            advice = f"has schema {version}; `aggregator run` brings it to {SCHEMA_VERSION}"
            raise ConfigError(str(path), "", advice)
        if version > SCHEMA_VERSION:
            raise ConfigError(str(path), "", f"has schema {version}, this program knows {SCHEMA_VERSION}: upgrade it")

    def close(self) -> None:
        """Let the file go."""
        self._connection.close()
        self._engine.dispose()
        if not self._read_only:
            sqlite.end_use(self._path)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside becomes durable together, or not at all: then the same may be tried again."""
        try:
            with self._connection.begin():
                yield
        except SQLAlchemyError as error:
            raise sqlite.failure(self._path, error) from error

    # -- writing, inside a transaction --

    def adopt(self, task: str, manifest_version: int, message: ReleaseMessage, graphs: tuple[bytes, bytes]) -> None:
        """A manifest with the names (sha256) of its graphs in the blobs; again is nothing."""
        values = {"signed": wire.pack(message.manifest), "train_graph": graphs[0], "eval_graph": graphs[1]}
        row = {"task": task, "manifest_version": manifest_version, **values}
        self._connection.execute(self._insert(_manifests).values(row).on_conflict_do_nothing())
        first = {"task": task, "state": "active", "restored": False}
        self._connection.execute(self._insert(_tasks).values(first).on_conflict_do_nothing())

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
        """A release, which replaces the newest of its task; the same number twice is our bug."""
        replaced = _releases.update().where(_releases.c.task == task, _releases.c.replaced_at.is_(None))
        self._connection.execute(replaced.values(replaced_at=int(now)))
        self._connection.execute(
            _releases.insert().values(
                task=task,
                manifest_version=manifest_version,
                number=number,
                signed=wire.pack(signed),
                weights=weights,
                created=int(now),
                restores=restores,
            )
        )

    def mark_withdrawn(self, task: str, manifest_version: int, number: int, now: float) -> None:
        """The chunks of a release are no longer retained on the broker."""
        where = _release(task, manifest_version, number)
        self._connection.execute(_releases.update().where(*where).values(withdrawn_at=int(now)))

    def forget_releases(self, task: str, keep: int) -> int:
        """Let go of the rows of withdrawn releases, but for the newest `keep` of the task; returns how many."""
        key = (_releases.c.manifest_version, _releases.c.number)
        newest = sa.select(*key).where(_releases.c.task == task).order_by(*(each.desc() for each in key))
        last = self._connection.execute(newest.offset(keep - 1).limit(1)).one_or_none()
        if last is None:
            return 0
        older = sa.tuple_(*key) < sa.tuple_(*last)
        spent = _releases.delete().where(_releases.c.task == task, older, _releases.c.withdrawn_at.is_not(None))
        return self._connection.execute(spent).rowcount

    def open_round(self, task: str, manifest_version: int, number: int, offer: Signed, opened: float) -> None:
        """A new open round with its first offer."""
        row = {"task": task, "manifest_version": manifest_version, "round": number, "state": "open"}
        self._connection.execute(_rounds.insert().values(**row, offer=wire.pack(offer), extensions=0, opened=opened))

    def revise_round(
        self, task: str, manifest_version: int, number: int, state: str | None, offer: Signed, extensions: int
    ) -> None:
        """A re-issued offer and the state that goes with it; None leaves the state as it is."""
        if state is not None and state not in PHASES | ENDINGS:
            raise LocalProtocolError(f"a round cannot be {state}")
        changed = {"offer": wire.pack(offer), "extensions": extensions} | ({"state": state} if state else {})
        self._connection.execute(_rounds.update().where(*_round(task, manifest_version, number)).values(changed))

    def end_round(self, task: str, manifest_version: int, number: int, how: str, now: float) -> None:
        """The one way in which a round ended (an Ending)."""
        if how not in ENDINGS:
            raise LocalProtocolError(f"a round cannot end as {how}")
        self._connection.execute(
            _rounds.update().where(*_round(task, manifest_version, number)).values(state=how, ended=now)
        )

    def contribute(self, rows: Sequence[Contribution]) -> set[bytes]:
        """Record contributions, rejected ones too; returns the head digests of those that were new: only these count.

        A device has one row a round, so a rejected one takes its place.
        """
        if not rows:
            return set()
        statement = self._insert(_contributions).on_conflict_do_nothing().returning(_contributions.c.head_digest)
        # The rows apart from the statement: so it is compiled once, and not for every batch (0.15 ms a row, not 1).
        returned = self._connection.execute(statement, [_values(row) for row in rows])
        return {digest for (digest,) in returned}

    def set_task_state(self, task: str, state: TaskState) -> None:
        """What the operator wants of a task."""
        if state not in TASK_STATES:
            raise LocalProtocolError(f"a task cannot be {state}")
        self._change_task(task, {"state": state})

    def set_restored(self, task: str, restored: bool) -> None:
        """Whether a task still waits for what the broker knows of it."""
        self._change_task(task, {"restored": restored})

    def mark_restored(self, now: float) -> None:
        """Every task comes from a backup, and every round that was open then has ended, since its key is gone."""
        self._connection.execute(_tasks.update().values(restored=True))
        going = _rounds.update().where(_rounds.c.state.in_(sorted(PHASES)))
        self._connection.execute(going.values(state="superseded", ended=now))

    def prune(self, now: float, most: int = 10_000) -> int:
        """Forget rows of rounds that ended more than 400 days ago; returns how many, at most `most`.

        The newest round of a manifest stays, since numbers go on from it.
        """
        over = _rounds.c.ended < now - REMEMBERED
        key = tuple(_contributions.primary_key.columns)
        old = sa.select(*key).join(
            _rounds,
            (_rounds.c.task == _contributions.c.task)
            & (_rounds.c.manifest_version == _contributions.c.manifest_version)
            & (_rounds.c.round == _contributions.c.origin_round),
        )
        first = _contributions.delete().where(sa.tuple_(*key).in_(old.where(over).limit(most)))
        gone = self._connection.execute(first).rowcount
        if gone >= most:
            return gone
        key = tuple(_rounds.primary_key.columns)
        newest = sa.select(_rounds.c.task, _rounds.c.manifest_version, sa.func.max(_rounds.c.round)).group_by(*key[:2])
        spent = sa.select(*key).where(over, sa.tuple_(*key).not_in(newest)).limit(most - gone)
        return gone + self._connection.execute(_rounds.delete().where(sa.tuple_(*key).in_(spent))).rowcount

    # -- reading --

    def tasks(self) -> list[StoredTask]:
        """The newest state of every task, by name."""
        newest = sa.select(_manifests.c.task, sa.func.max(_manifests.c.manifest_version)).group_by(_manifests.c.task)
        with self._reading():
            found = self._connection.execute(newest.order_by(_manifests.c.task)).all()
            return [self._task(task, version) for task, version in found]

    def task_state(self, task: str) -> TaskState:
        """What the operator wants of a task; `active` for one that is not known."""
        with self._reading():
            found = self._connection.scalar(sa.select(_tasks.c.state).where(_tasks.c.task == task))
        return found or "active"

    def model(self, task: str, manifest_version: int) -> tuple[bytes, bytes, bytes]:
        """Names (sha256) of the train graph, eval graph and newest weights of a manifest."""
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

    def release(self, task: str, manifest_version: int, number: int) -> StoredRelease | None:
        """A release by its number."""
        query = sa.select(_releases).where(*_release(task, manifest_version, number))
        with self._reading():
            row = self._connection.execute(query).one_or_none()
            return None if row is None else _stored_release(row)

    def releases(self, task: str, manifest_version: int, most: int) -> list[StoredRelease]:
        """The newest `most` releases of a manifest, the newest first."""
        query = (
            sa.select(_releases)
            .where(_releases.c.task == task, _releases.c.manifest_version == manifest_version)
            .order_by(_releases.c.number.desc())
            .limit(most)
        )
        with self._reading():
            return [_stored_release(row) for row in self._connection.execute(query)]

    def retained(self, task: str) -> list[StoredRelease]:
        """The releases of a task that are not withdrawn, of any manifest, the newest first."""
        query = (
            sa.select(_releases)
            .where(_releases.c.task == task, _releases.c.withdrawn_at.is_(None))
            .order_by(_releases.c.manifest_version.desc(), _releases.c.number.desc())
        )
        with self._reading():
            return [_stored_release(row) for row in self._connection.execute(query)]

    def contributions(self, task: str, manifest_version: int, number: int) -> list[Contribution]:
        """What counts of a round, in the order of the fold."""
        return self._collected(task, manifest_version, number, "accepted")

    def recall(self, task: str, manifest_version: int, origin_round: int, device: str) -> Contribution | None:
        """What a device's update to a round became, if it had one."""
        query = sa.select(_contributions).where(
            _contributions.c.task == task,
            _contributions.c.manifest_version == manifest_version,
            _contributions.c.origin_round == origin_round,
            _contributions.c.device == device,
        )
        with self._reading():
            row = self._connection.execute(query).one_or_none()
            return None if row is None else _contribution(row)

    def recall_head(self, task: str, origin_round: int, device: str, head_digest: bytes) -> Contribution | None:
        """What this very head of a device became, under any manifest."""
        query = sa.select(_contributions).where(
            _contributions.c.task == task,
            _contributions.c.origin_round == origin_round,
            _contributions.c.device == device,
            _contributions.c.head_digest == head_digest,
        )
        with self._reading():
            row = self._connection.execute(query).one_or_none()
            return None if row is None else _contribution(row)

    def last_updates(self, devices: Sequence[str], rounds: int = 5) -> dict[str, Contribution]:
        """The newest update of each device, if it was for one of the newest `rounds` of a task."""
        found: dict[str, Contribution] = {}
        for task in self.tasks():
            if task.round is None:
                continue
            recent = range(max(1, task.round.number - rounds + 1), task.round.number + 1)
            # By equality alone, so that every row is found by the primary key.
            query = sa.select(_contributions).where(
                _contributions.c.task == task.name,
                _contributions.c.manifest_version == task.manifest_version,
                _contributions.c.origin_round.in_(list(recent)),
                _contributions.c.device.in_(list(devices)),
            )
            with self._reading():
                rows = [_contribution(row) for row in self._connection.execute(query)]
            for row in rows:
                if row.device not in found or found[row.device].at < row.at:
                    found[row.device] = row
        return found

    def weights_in_use(self, keep: int) -> set[bytes]:
        """Names of the weights of the newest `keep` releases of each task's newest manifest."""
        key = (_releases.c.task, _releases.c.manifest_version)
        newest = sa.select(_manifests.c.task, sa.func.max(_manifests.c.manifest_version)).group_by(_manifests.c.task)
        place = sa.func.row_number().over(partition_by=key, order_by=_releases.c.number.desc())
        ranked = sa.select(_releases.c.weights, place.label("place")).where(sa.tuple_(*key).in_(newest)).subquery()
        with self._reading():
            return set(self._connection.scalars(sa.select(ranked.c.weights).where(ranked.c.place <= keep)))

    def weights_spent(self, task: str, keep: int) -> set[bytes]:
        """Names of weights that fell out of use lately: of the `keep` releases before those that are kept."""
        query = (
            sa.select(_releases.c.weights)
            .where(_releases.c.task == task)
            .order_by(_releases.c.manifest_version.desc(), _releases.c.number.desc())
            .limit(2 * keep)
        )
        with self._reading():
            return set(self._connection.scalars(query)) - self.weights_in_use(keep)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        outer = self._connection.in_transaction()
        try:
            yield
        except SQLAlchemyError as error:
            raise sqlite.failure(self._path, error) from error
        except RemoteProtocolError as error:
            # Only what was verified is ever stored.
            raise sqlite.damaged(self._path, f"a record in it is {error}") from error
        finally:
            if not outer:
                self._connection.rollback()

    def _version(self, *, create: bool) -> int:
        """The schema's version; in an empty database it is made first."""
        with self._connection.begin():
            if create and not sa.inspect(self._connection).get_table_names():
                _meta.create_all(self._connection)
                self._connection.execute(_schema.insert().values(version=SCHEMA_VERSION))
            version: int = self._connection.scalars(sa.select(_schema.c.version)).one()
            return version

    def _change_task(self, task: str, values: dict[str, object]) -> None:
        changed = self._connection.execute(_tasks.update().where(_tasks.c.task == task).values(values))
        if changed.rowcount != 1:
            raise LocalProtocolError(f"there is no task {task} in the database")

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
        wanted = self._connection.execute(sa.select(_tasks).where(_tasks.c.task == task)).one()
        found = None
        accepted: list[Contribution] = []
        rejected: list[Contribution] = []
        if row is not None:
            found = StoredRound(row.round, row.state, wire.unpack(row.offer, Signed), row.extensions, row.opened)
            accepted = self._collected(task, version, found.number, "accepted")
            rejected = self._collected(task, version, found.number, "rejected")
        return StoredTask(
            name=task,
            manifest_version=version,
            manifest=wire.unpack(manifest, Signed),
            release=wire.unpack(release, Signed),
            round=found,
            contributions=tuple(accepted),
            rejected=tuple(rejected),
            state=wanted.state,
            restored=wanted.restored,
        )

    def _collected(self, task: str, manifest_version: int, number: int, outcome: str) -> list[Contribution]:
        query = (
            sa.select(_contributions)
            .where(
                _contributions.c.task == task,
                _contributions.c.manifest_version == manifest_version,
                _contributions.c.collected_in == number,
                _contributions.c.outcome == outcome,
            )
            .order_by(_contributions.c.seq, _contributions.c.device)
        )
        with self._reading():
            return [_contribution(row) for row in self._connection.execute(query)]


def _from_1_to_2(connection: sa.Connection) -> None:
    """What version 2 added; nothing of version 1 is changed.

    In version 1 weights travelled whole, in messages that the next one replaced: of an older release nothing is
    retained.
    """
    for change in (
        "contributions ADD COLUMN reason VARCHAR DEFAULT '' NOT NULL",
        "releases ADD COLUMN replaced_at BIGINT",
        "releases ADD COLUMN withdrawn_at BIGINT",
        "releases ADD COLUMN restores BIGINT",
    ):
        connection.execute(sa.text(f"ALTER TABLE {change}"))
    _collected.create(connection)
    _tasks.create(connection)
    manifests = sa.select(_manifests.c.task, sa.literal("active"), sa.false()).distinct()
    connection.execute(_tasks.insert().from_select(["task", "state", "restored"], manifests))
    key = (_releases.c.task, _releases.c.manifest_version, _releases.c.number)
    ordered = connection.execute(sa.select(*key, _releases.c.created).order_by(*key)).all()
    for row, after in pairwise(ordered):
        if row.task == after.task:
            times = {"replaced_at": after.created, "withdrawn_at": after.created}
            connection.execute(_releases.update().where(*_release(*row[:3])).values(times))
    connection.execute(_schema.update().values(version=2))


def _round(task: str, manifest_version: int, number: int) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        _rounds.c.task == task,
        _rounds.c.manifest_version == manifest_version,
        _rounds.c.round == number,
    )


def _release(task: str, manifest_version: int, number: int) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        _releases.c.task == task,
        _releases.c.manifest_version == manifest_version,
        _releases.c.number == number,
    )


def _values(row: Contribution) -> dict[str, object]:
    return {name: getattr(row, name) for name in _contributions.c.keys()} | {"metrics": wire.pack(row.metrics)}  # noqa: SIM118


def _contribution(row: sa.Row[tuple[object, ...]]) -> Contribution:
    values = dict(row._mapping)
    return Contribution(**{**values, "metrics": wire.unpack(values["metrics"], Metrics)})


def _stored_release(row: sa.Row[tuple[object, ...]]) -> StoredRelease:
    values = dict(row._mapping)
    return StoredRelease(**{**values, "signed": wire.unpack(values["signed"], Signed)})
