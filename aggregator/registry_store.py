"""What the registrar must remember: tokens without their secrets, devices, and every certificate it issued, as rows.

One connection, used by the owner alone. Every change happens inside `transaction` and is durable when that returns.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from aggregator import registry, sqlite
from aggregator.registry import StoredCertificate, StoredDevice, StoredToken
from shared.errors import ConfigError, StorageError

FILE = sqlite.REGISTRY
"""Its name in the registrar's state directory."""
SCHEMA_VERSION = 1

_meta = sa.MetaData()
_schema = sa.Table("schema_version", _meta, sa.Column("version", sa.Integer, primary_key=True))
_tokens = sa.Table(
    "tokens",
    _meta,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("name", sa.String),
    sa.Column("again", sa.Boolean, nullable=False),
    sa.Column("labels", sa.String, nullable=False),  # JSON
    sa.Column("created", sa.BigInteger, nullable=False),
    sa.Column("expires", sa.BigInteger, nullable=False),
    sa.Column("revoked_at", sa.BigInteger),
    sa.Column("used_at", sa.BigInteger),
    sa.Column("device", sa.String),
    sa.Column("key", sa.LargeBinary),
)
_devices = sa.Table(
    "devices",
    _meta,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("labels", sa.String, nullable=False),  # JSON
    sa.Column("enrolled", sa.BigInteger, nullable=False),
    sa.Column("how", sa.String, nullable=False),  # token or bundle
)
_certificates = sa.Table(
    "certificates",
    _meta,
    sa.Column("serial", sa.String, primary_key=True),  # hex: it has up to 160 bits
    sa.Column("device", sa.String, nullable=False, index=True),
    sa.Column("key", sa.LargeBinary, nullable=False, index=True),
    sa.Column("issued", sa.BigInteger, nullable=False),
    sa.Column("not_after", sa.BigInteger, nullable=False),
    sa.Column("pem", sa.String, nullable=False),
    sa.Column("revoked_at", sa.BigInteger),
)


class RegistryStore(registry.Ledger):
    """The registry's database file."""

    def __init__(self, path: Path) -> None:
        """Open or create it; ConfigError if it is not one of ours, is damaged, or of a later version."""
        self._path = path
        suspect = sqlite.begin_use(path)
        self._engine = sqlite.engine(path, read_only=False)
        try:
            self._connection = self._engine.connect()
            if suspect:
                sqlite.check(path, self._connection)
            version = self._version()
        except (SQLAlchemyError, sqlite3.Error) as error:
            failed = sqlite.failure(path, error)
            if isinstance(failed, ConfigError) or (isinstance(failed, StorageError) and failed.passing):
                raise failed from error
            raise ConfigError(str(path), "", f"is not a usable database: {failed}") from None
        if version != SCHEMA_VERSION:
            raise ConfigError(str(path), "", f"has schema {version}, this program knows {SCHEMA_VERSION}: upgrade it")

    def close(self) -> None:
        """Let the file go."""
        self._connection.close()
        self._engine.dispose()
        sqlite.end_use(self._path)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside becomes durable together, or not at all. Raises StorageError, where it may be tried again.

        What is decided on what was read inside stays true until it is written.
        """
        try:
            with self._connection.begin():
                yield
        except SQLAlchemyError as error:
            raise sqlite.failure(self._path, error) from error

    # -- reading, inside a transaction --

    def token(self, token: str) -> StoredToken | None:
        """The token of this id."""
        row = self._one(sa.select(_tokens).where(_tokens.c.id == token))
        return None if row is None else _token(row)

    def tokens(self, after: str, limit: int) -> list[StoredToken]:
        """The first tokens whose ids come after this one."""
        found = sa.select(_tokens).where(_tokens.c.id > after).order_by(_tokens.c.id).limit(limit)
        return [_token(row) for row in self._rows(found)]

    def device(self, name: str) -> StoredDevice | None:
        """The device of this name."""
        row = self._one(sa.select(_devices).where(_devices.c.name == name))
        return None if row is None else _device(row)

    def devices(self, after: str, limit: int) -> list[StoredDevice]:
        """The first devices whose names come after this one."""
        found = sa.select(_devices).where(_devices.c.name > after).order_by(_devices.c.name).limit(limit)
        return [_device(row) for row in self._rows(found)]

    def certificate(self, serial: int) -> StoredCertificate | None:
        """The certificate of this serial number, if it is known."""
        row = self._one(sa.select(_certificates).where(_certificates.c.serial == f"{serial:x}"))
        return None if row is None else _certificate(row)

    def certificates(self, device: str, limit: int) -> list[StoredCertificate]:
        """A device's, newest first."""
        order = (_certificates.c.issued.desc(), _certificates.c.not_after.desc())
        found = sa.select(_certificates).where(_certificates.c.device == device).order_by(*order).limit(limit)
        return [_certificate(row) for row in self._rows(found)]

    def of_key(self, key: bytes) -> StoredCertificate | None:
        """The newest certificate for this key."""
        found = sa.select(_certificates).where(_certificates.c.key == key)
        row = self._one(found.order_by(_certificates.c.issued.desc(), _certificates.c.not_after.desc()).limit(1))
        return None if row is None else _certificate(row)

    def issued_since(self, device: str, moment: int) -> int:
        """How many certificates a device got since then."""
        where = (_certificates.c.device == device, _certificates.c.issued > moment)
        return int(self._connection.execute(sa.select(sa.func.count()).where(*where)).scalar_one())

    def revoked(self, now: float) -> list[tuple[int, int]]:
        """(serial, when) of every revoked certificate that has not expired, by serial."""
        where = (_certificates.c.revoked_at.is_not(None), _certificates.c.not_after > int(now))
        found = sa.select(_certificates.c.serial, _certificates.c.revoked_at).where(*where)
        return sorted((int(row["serial"], 16), int(row["revoked_at"])) for row in self._rows(found))

    # -- writing, inside a transaction --

    def add_token(self, token: StoredToken) -> None:
        """A new token; an id that exists is our bug."""
        row: dict[str, object] = {"id": token.id, "digest": token.digest, "name": token.name, "again": token.again}
        row |= {"labels": _json(token.labels), "created": token.created, "expires": token.expires}
        self._connection.execute(_tokens.insert().values(row))

    def use_token(self, token: str, device: str, key: bytes, now: float) -> None:
        """It let a device in; it will not let in another."""
        values = {"used_at": int(now), "device": device, "key": key}
        self._connection.execute(_tokens.update().where(_tokens.c.id == token).values(values))

    def revoke_token(self, token: str, now: float) -> None:
        """It lets nobody in from now on."""
        self._connection.execute(_tokens.update().where(_tokens.c.id == token).values(revoked_at=int(now)))

    def put_device(self, device: StoredDevice) -> None:
        """A new device, or one in the place of another of its name."""
        self._connection.execute(_devices.delete().where(_devices.c.name == device.name))
        row = {"name": device.name, "labels": _json(device.labels), "enrolled": device.enrolled, "how": device.how}
        self._connection.execute(_devices.insert().values(row))

    def label(self, device: str, labels: Mapping[str, str]) -> None:
        """Replace a device's labels."""
        self._connection.execute(_devices.update().where(_devices.c.name == device).values(labels=_json(labels)))

    def add_certificate(self, certificate: StoredCertificate) -> None:
        """One that was issued; a serial number that exists is our bug."""
        row: dict[str, object] = {"serial": f"{certificate.serial:x}", "device": certificate.device}
        row |= {
            "key": certificate.key,
            "issued": certificate.issued,
            "not_after": certificate.not_after,
            "pem": certificate.pem,
        }
        self._connection.execute(_certificates.insert().values(row))

    def revoke_certificates(self, device: str, now: float) -> int:
        """Revoke all that a device has; returns how many were not revoked before."""
        where = (_certificates.c.device == device, _certificates.c.revoked_at.is_(None))
        return self._connection.execute(_certificates.update().where(*where).values(revoked_at=int(now))).rowcount

    def forget(self, moment: float) -> int:
        """Let go of certificates that ended before; returns how many."""
        return self._connection.execute(_certificates.delete().where(_certificates.c.not_after < int(moment))).rowcount

    # -- inside --

    def _version(self) -> int:
        with self._connection.begin():
            if not sa.inspect(self._connection).has_table(_schema.name):
                if sa.inspect(self._connection).get_table_names():
                    raise ConfigError(str(self._path), "", "is the database of another program")
                _meta.create_all(self._connection)
                self._connection.execute(_schema.insert().values(version=SCHEMA_VERSION))
            return int(self._connection.execute(sa.select(_schema.c.version)).scalar_one())

    def _rows(self, statement: sa.Select[Any]) -> list[Mapping[str, Any]]:
        return [dict(row) for row in self._connection.execute(statement).mappings()]

    def _one(self, statement: sa.Select[Any]) -> Mapping[str, Any] | None:
        return next(iter(self._rows(statement)), None)


def _json(labels: Mapping[str, str]) -> str:
    return json.dumps(dict(sorted(labels.items())))


def _token(row: Mapping[str, Any]) -> StoredToken:
    return StoredToken(**{**row, "labels": json.loads(row["labels"])})


def _device(row: Mapping[str, Any]) -> StoredDevice:
    return StoredDevice(**{**row, "labels": json.loads(row["labels"])})


def _certificate(row: Mapping[str, Any]) -> StoredCertificate:
    return StoredCertificate(**{**row, "serial": int(row["serial"], 16)})
