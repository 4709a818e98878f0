"""The one file that SQLite keeps: how it is opened, checked, copied, and what its errors mean.

All that only SQLite knows is here, so that aggregator.store stays one SQL for every database. It knows no table.
"""

import contextlib
import os
import sqlite3
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from shared.errors import ConfigError, FieldfareError, LocalProtocolError, StorageError
from shared.files import sync_folder

REGISTRY = "registry.db"
"""The registrar's file, which no `aggregator backup` holds."""
SMALL = 64 << 20
"""Bytes of a file that is checked at every start: that takes well under a second."""
_PASSING = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM}
"""What may be otherwise at the next try."""
_REFUSED = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}
"""What somebody has to allow first."""
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def engine(path: Path, *, read_only: bool) -> sa.Engine:
    """One connection to the file, whose transactions hold everything, schema changes too."""
    mode = {"mode": "ro" if read_only else "rwc", "uri": "true"}
    url = sa.URL.create("sqlite", database=path.resolve().as_uri(), query=mode)
    made = sa.create_engine(url, poolclass=sa.pool.StaticPool, connect_args={"check_same_thread": False})

    def connected(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None  # the module's own BEGIN comes too late for CREATE and ALTER
        if not read_only:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")

    sa.event.listen(made, "connect", connected)
    sa.event.listen(made, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return made


def begin_use(path: Path) -> bool:
    """Note that the file is written to from now on; whether it should be checked before."""
    mark = _mark(path)
    try:
        unclean = mark.exists()
        size = path.stat().st_size if path.exists() else 0
        mark.touch(0o600)
        sync_folder(path.parent)
    except OSError as error:
        raise StorageError.of(mark, error) from error
    return unclean or size <= SMALL


def end_use(path: Path) -> None:
    """Note that the file was closed as it should be."""
    with contextlib.suppress(OSError):  # then the next start checks it, no more
        _mark(path).unlink()


def check(path: Path, connection: sa.Connection) -> None:
    """Look at every page; ConfigError if one is damaged."""
    with connection.begin():
        found = str(connection.exec_driver_sql("PRAGMA quick_check(1)").scalar())
    if found != "ok":
        raise damaged(path, found.splitlines()[-1])


def damaged(path: Path, detail: str) -> ConfigError:
    """Nothing in the file can be trusted any more, and it takes a person to decide what to lose."""
    remedy = "`aggregator restore FILE --force` sets it aside and begins from a backup"
    if path.name == REGISTRY:
        remedy = "put a copy of it back, or move it away: then tokens are lost, and devices keep their certificates"
    return ConfigError(str(path), "", f"is damaged ({detail}): {remedy}")


def copy(source: Path, target: Path) -> None:
    """A consistent copy of a database that may be in use, whole under its name or not there at all."""
    new = target.with_name(f"{target.name}.new")
    new.unlink(missing_ok=True)
    try:
        new.touch(0o600)
        reading = sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)
        writing = sqlite3.connect(new)
        try:
            writing.execute("PRAGMA synchronous=OFF")  # the file is synchronised as a whole below
            reading.backup(writing)
            # The copy says WAL as its source does, and would want files beside it to be read.
            writing.execute("PRAGMA journal_mode=DELETE")
        finally:
            writing.close()
            reading.close()
        with new.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(new, target)
        sync_folder(target.parent)
    except sqlite3.Error as error:
        new.unlink(missing_ok=True)
        raise failure(target, error) from error
    except OSError as error:
        new.unlink(missing_ok=True)
        raise StorageError.of(target, error) from error


def failure(path: Path, error: SQLAlchemyError | sqlite3.Error) -> FieldfareError:
    """What a database's error is to us: the disk's fault, damage (ConfigError), or our own."""
    cause = getattr(error, "orig", None) or error
    text = (str(cause) or type(cause).__name__).splitlines()[0]
    code = getattr(cause, "sqlite_errorcode", None)
    kind = None if code is None else code & 0xFF
    if kind in _DAMAGED:
        return damaged(path, text)
    if kind in _PASSING | _REFUSED:
        return StorageError(str(path), text, passing=kind in _PASSING)
    return LocalProtocolError(f"the database failed: {text}")


def _mark(path: Path) -> Path:
    """A file that is there while the database is written to, and after a stop that was none."""
    return path.with_name(f"{path.name}.in-use")
