"""The one file that SQLite keeps: how it is opened, checked, copied, and what its errors mean.

All that only SQLite knows is here, so that aggregator.store stays one SQL for every database. It knows no table.
"""

import os
import sqlite3
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from shared.errors import FieldfareError, LocalProtocolError, StorageError

_PASSING = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM}
"""What may be otherwise at the next try."""
_BROKEN = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}
"""What somebody has to mend."""


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
        for path in (new, None):
            handle = os.open(path or target.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            if path is not None:
                os.replace(new, target)
    except sqlite3.Error as error:
        new.unlink(missing_ok=True)
        raise failure(target, error) from error
    except OSError as error:
        new.unlink(missing_ok=True)
        raise StorageError.of(target, error) from error


def failure(path: Path, error: SQLAlchemyError | sqlite3.Error) -> FieldfareError:
    """What a database's error is to us: the disk's or the file's fault, or our own."""
    cause = getattr(error, "orig", None) or error
    text = (str(cause) or type(cause).__name__).splitlines()[0]
    code = getattr(cause, "sqlite_errorcode", None)
    if code is not None and code & 0xFF in _PASSING | _BROKEN:
        return StorageError(str(path), text, passing=code & 0xFF in _PASSING)
    return LocalProtocolError(f"the database failed: {text}")
