"""A fleet's keys and certificates: made once by `init_fleet`, and a bundle for each device by `add_device`.

Private files are for their owner alone; nothing is overwritten, and a failure leaves nothing half-made. Certificates
are ECDSA P-256, signing keys Ed25519. No clock is read: `now` is seconds since 1970. It never contacts a device.
"""

import getpass
import ipaddress
import json
import os
import re
import shutil
import tarfile
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePath
from typing import Annotated

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from aggregator import broker
from shared import identity, signing, wire
from shared.enrolment import BACKDATED, PORT
from shared.errors import ConfigError
from shared.messages import PublisherKey, Role, Root
from shared.topics import SERVICE_OPERATOR, is_name, shard_client

BROKER_NAME = "_broker"
"""The common name of the broker's certificate; it is for a server alone, so no client has it."""

REGISTRAR_NAME = "_registrar"
"""Likewise of the registrar's."""

_EARLIER = timedelta(seconds=BACKDATED)

_SERVICE = re.compile(r"_[a-z]{1,32}(-[0-9]{1,5})?")
_HOST = re.compile(r"[A-Za-z0-9._:-]{1,253}")
_ARCHIVE = "bundle.tar.gz"
_PUBLIC, _PRIVATE = 0o644, 0o600


class Fleet(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a fleet's folder remembers in `fleet.toml`; devices are told it in their bundles."""

    name: str
    hosts: Annotated[list[str], msgspec.Meta(min_length=1)]
    """Names and addresses in the broker's certificate; devices connect to the first."""
    port: Annotated[int, msgspec.Meta(ge=1, le=65_535)]
    prefix: str
    message_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Days:
    """How long what `init_fleet` makes is valid; nothing outlives the CA."""

    ca: int = 3650
    root: int = 3650
    publisher: int = 1825
    service: int = 1095
    """Operator, aggregator and broker."""


@dataclass(frozen=True, slots=True)
class Authority:
    """The CA's certificate and its open key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def init_fleet(
    directory: Path,
    name: str,
    hosts: Sequence[str],
    *,
    now: float,
    passphrase: bytes | None,
    port: int = 8883,
    prefix: str = "fl",
    message_max: int = broker.MESSAGE_MAX,
    days: Days = Days(),
    loopback: bool = True,
    bind: str = "",
    broker_home: PurePath | None = None,
    broker_data: PurePath | None = None,
    broker_user: str | None = None,
) -> Fleet:
    """Make a fleet's folder: CA, root, publisher, operator, aggregator and broker. Raises ConfigError.

    `passphrase` encrypts the keys of CA, root and publisher; None leaves them open. `hosts` are the broker's names and
    addresses, the first of which devices use; with `loopback` its certificate is good for this machine's own too.
    The broker's configuration is rendered to run where it lies, as this user, unless `broker_home`, `broker_data` and
    `broker_user` say where it will be.
    """
    fleet = Fleet(name=name, hosts=list(hosts), port=port, prefix=prefix, message_max=message_max)
    _check(directory, fleet, passphrase, days)
    born = datetime.fromtimestamp(now, UTC)
    final = directory.absolute()
    settings = broker.Settings(
        home=broker_home or final / "broker",
        data=broker_data or final / "broker" / "data",
        port=port,
        bind=bind,
        user=broker_user or getpass.getuser(),
        prefix=prefix,
        message_max=message_max,
    )
    rendered = broker.render(settings)
    with _all_or_nothing(directory) as made:
        authority = _authority(name, born, days.ca)
        ca = _pem(authority.certificate)
        _write(made / "ca" / "ca.crt", ca)
        _write_key(made / "ca" / "ca.key", authority.key, passphrase)

        root, publisher, aggregator = (ed25519.Ed25519PrivateKey.generate() for _ in range(3))
        record = Root(
            v=1,
            fleet=name,
            version=1,
            expires=_seconds(born + timedelta(days=days.root)),
            root_keys=[signing.public_bytes(root)],
            publishers=[
                PublisherKey(
                    key=signing.public_bytes(publisher), expires=_seconds(born + timedelta(days=days.publisher))
                )
            ],
        )
        trust = wire.pack(signing.sign(record, Role.ROOT, root))
        _write(made / "root" / "root.msgpack", trust)
        _write_key(made / "root" / "root.key", root, passphrase)
        _write_key(made / "publisher" / "publisher.key", publisher, passphrase)

        _write_identity(made / "operator", "operator", SERVICE_OPERATOR, authority, born, days.service)
        _write_identity(made / "aggregator", "agg-0", shard_client(0), authority, born, days.service)
        _write_key(made / "aggregator" / "signing.key", aggregator, None)
        public = aggregator.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        _write(made / "aggregator" / "signing.pub", public)
        _write(made / "aggregator" / "root.msgpack", trust)
        _write(made / "aggregator" / "aggregator.toml", _aggregator_toml(fleet).encode())

        key = ec.generate_private_key(ec.SECP256R1())
        names = _server_names(hosts, loopback)
        certificate = _issue_server(authority, BROKER_NAME, key.public_key(), names, born, days.service)
        _write(made / "broker" / "ca.crt", ca)
        _write(made / "broker" / "server.crt", _pem(certificate))
        _write_key(made / "broker" / "server.key", key, None)
        _write(made / "broker" / "mosquitto.conf", rendered["mosquitto.conf"].encode())
        _write(made / "broker" / "acl", rendered["acl"].encode(), _PRIVATE)  # mosquitto is going to insist on it
        (made / "broker" / "data").mkdir(mode=0o700)

        (made / "devices").mkdir(mode=0o700)
        _write(made / "fleet.toml", _fleet_toml(fleet).encode())
    return fleet


def read_fleet(directory: Path) -> Fleet:
    """What `init_fleet` wrote down of the fleet; raises ConfigError."""
    path = directory / "fleet.toml"
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Fleet)
    except OSError as error:
        advice = "name the folder that `aggregator fleet init` made"
        raise ConfigError(str(path), "", f"cannot be read: {error.strerror}; {advice}") from None
    except (ValueError, msgspec.ValidationError) as error:
        raise ConfigError(str(path), "", f"was changed by hand and is not valid any more: {error}") from None


def add_device(
    directory: Path,
    name: str,
    out: Path,
    *,
    now: float,
    passphrase: bytes | None,
    days: int = 365,
    again: bool = False,
) -> Path:
    """Make the bundle of the device `name`: a folder, or one archive when `out` ends in .tar.gz; returns `out`.

    Raises ConfigError, for instance when the device has a certificate already, unless `again`.
    """
    if not is_name(name):
        raise _bad_name("device", name)
    if days < 1:
        raise ConfigError("device", "days", "must be at least 1")
    _absent(out)
    fleet = read_fleet(directory)
    authority = open_authority(directory, passphrase)
    born = datetime.fromtimestamp(now, UTC)
    if authority.certificate.not_valid_after_utc <= born:
        raise ConfigError(str(directory / "ca" / "ca.crt"), "", "has expired: make a new fleet")
    record = directory / "devices" / f"{name}.crt"
    issued = record.read_bytes() if record.exists() else None
    if issued is not None and not again:
        raise ConfigError(str(record), "", f"{name} has a certificate already; take another name, or --again")

    archive = out.name.endswith((".tar.gz", ".tgz"))
    try:
        with _all_or_nothing(out) as made:
            bundle = made / name if archive else made
            certificate = _write_identity(bundle, "device", name, authority, born, days)
            _write(bundle / "root.msgpack", _read(directory / "root" / "root.msgpack"))
            _write(bundle / "agent.toml", _agent_toml(fleet, name).encode())
            if archive:
                _pack(made, name, now)
            # Recorded before it is handed out: no certificate exists that the fleet does not know of.
            _replace(record, (issued or b"") + _pem(certificate))
    except BaseException:
        _restore(record, issued)
        raise
    return out


def init_registrar(
    directory: Path,
    hosts: Sequence[str],
    out: Path,
    *,
    now: float,
    passphrase: bytes | None,
    port: int = PORT,
    bind: str = "",
    days: int = Days().service,
    loopback: bool = True,
) -> Path:
    """Make the registrar's folder out of a fleet's: its configuration, its server's identity and an open copy of the
    CA's key; returns `out`. Raises ConfigError.

    `hosts` are its names and addresses as devices reach it. The devices that have bundles go along, so that nobody
    takes one's name.
    """
    if not hosts or not all(_HOST.fullmatch(host) for host in hosts):
        raise ConfigError("registrar", "host", "needs at least one name or address, as devices reach it")
    _absent(out)
    fleet = read_fleet(directory)
    authority = open_authority(directory, passphrase)
    born = datetime.fromtimestamp(now, UTC)
    with _all_or_nothing(out) as made:
        key = ec.generate_private_key(ec.SECP256R1())
        names = _server_names(hosts, loopback)
        certificate = _issue_server(authority, REGISTRAR_NAME, key.public_key(), names, born, days)
        _write(made / "registrar.crt", _pem(certificate))
        _write_key(made / "registrar.key", key, None)
        _write(made / "ca.crt", _pem(authority.certificate))
        _write_key(made / "ca.key", authority.key, None)
        _write(made / "root.msgpack", _read(directory / "root" / "root.msgpack"))
        _write(made / "bundles.pem", b"".join(map(_read, sorted((directory / "devices").glob("*.crt")))))
        # A broker that is told of a list does not start without one.
        _write(made / "ca.crl", issue_crl(authority, [], now))
        _write(made / "registrar.toml", _registrar_toml(fleet, port, bind).encode())
    return out


def render_broker(
    directory: Path,
    out: Path,
    *,
    home: PurePath,
    data: PurePath,
    user: str,
    bind: str = "",
    version: broker.Version = "2.0",
    crl: PurePath | None = None,
) -> Path:
    """Make the folder of a fleet's broker anew, for a mosquitto that its distribution starts; returns `out`.

    `home` is where its files will lie and `data` where it keeps its state, on its host. With `crl`, where the registrar
    writes its list on that host, it turns revoked certificates away. Raises ConfigError.
    """
    _absent(out)
    fleet = read_fleet(directory)
    settings = broker.Settings(
        home=home,
        data=data,
        port=fleet.port,
        bind=bind,
        user=user,
        prefix=fleet.prefix,
        message_max=fleet.message_max,
        version=version,
        crl=crl is not None,
    )
    rendered, units = broker.render(settings), broker.render_units(settings, crl)
    with _all_or_nothing(out) as made:
        for name in ("ca.crt", "server.crt", "server.key"):
            data_of = _read(directory / "broker" / name)
            _write(made / name, data_of, _PRIVATE if name.endswith(".key") else _PUBLIC)
        _write(made / "mosquitto.conf", rendered["mosquitto.conf"].encode())
        _write(made / "acl", rendered["acl"].encode(), _PRIVATE)
        (made / "systemd").mkdir(mode=0o700)
        for name, text in units.items():
            _write(made / "systemd" / name, text.encode())
    return out


def open_authority(directory: Path, passphrase: bytes | None) -> Authority:
    """The CA of a fleet's folder, ready to issue; raises ConfigError."""
    if not (directory / "ca").is_dir():
        raise ConfigError(str(directory), "", "is no folder of a fleet with its CA; name it with --fleet")
    return load_authority(directory / "ca" / "ca.crt", directory / "ca" / "ca.key", passphrase)


def load_authority(certificate: Path, key: Path, passphrase: bytes | None = None) -> Authority:
    """A CA by its two files, ready to issue; raises ConfigError."""
    found = Authority(identity.load_certificate(certificate), identity.load_key(key, passphrase))
    if found.key.public_key() != found.certificate.public_key():
        raise ConfigError(str(key), "", f"is not the key of {certificate}")
    return found


def issue_client(
    authority: Authority, name: str, public: ec.EllipticCurvePublicKey, born: datetime, life: timedelta
) -> x509.Certificate:
    """A certificate for the client `name`, which is also its alternative name (a DNS name: it takes an underscore).

    Raises ConfigError for a name that is neither a device's nor a service's. This is the only guard against a slash in
    a name: mosquitto keeps wildcards out of the ACL's patterns, but puts `dev-1/cmd` into them as it is.
    """
    if not is_name(name) and not _SERVICE.fullmatch(name):
        raise _bad_name("client", name)
    return _issue(authority, name, [x509.DNSName(name)], public, ExtendedKeyUsageOID.CLIENT_AUTH, born, life)


def issue_crl(authority: Authority, revoked: Iterable[tuple[int, int]], now: float) -> bytes:
    """The list (PEM) of revoked certificates, as (serial, when).

    It is good as long as the CA: mosquitto turns everybody away once the list has expired.
    """
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(datetime.fromtimestamp(now, UTC) - _EARLIER)
        .next_update(authority.certificate.not_valid_after_utc)
        .add_extension(x509.CRLNumber(int(now)), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            ),
            critical=False,
        )
    )
    for serial, when in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial)
        builder = builder.add_revoked_certificate(entry.revocation_date(datetime.fromtimestamp(when, UTC)).build())
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _issue_server(
    authority: Authority,
    name: str,
    public: ec.EllipticCurvePublicKey,
    names: list[x509.GeneralName],
    born: datetime,
    days: int,
) -> x509.Certificate:
    return _issue(authority, name, names, public, ExtendedKeyUsageOID.SERVER_AUTH, born, timedelta(days=days))


def _issue(
    authority: Authority,
    name: str,
    alternative: list[x509.GeneralName],
    public: ec.EllipticCurvePublicKey,
    usage: x509.ObjectIdentifier,
    born: datetime,
    life: timedelta,
) -> x509.Certificate:
    issuer = authority.certificate
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(name))
        .issuer_name(issuer.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(born - _EARLIER)
        .not_valid_after(min(born + life, issuer.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternative), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            ),
            critical=False,
        )
        .sign(authority.key, hashes.SHA256())
    )


def _authority(name: str, born: datetime, days: int) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_subject(name))
        .issuer_name(_subject(name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(born - _EARLIER)
        .not_valid_after(born + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(digital_signature=False), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key)


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(*, digital_signature: bool) -> x509.KeyUsage:
    """A leaf signs handshakes and heads; the CA signs certificates and lists of revoked ones."""
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=not digital_signature,
        crl_sign=not digital_signature,
        encipher_only=False,
        decipher_only=False,
    )


def _server_names(hosts: Sequence[str], loopback: bool) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys([*hosts, *(["localhost", "127.0.0.1", "::1"] if loopback else [])]):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return names


def _check(directory: Path, fleet: Fleet, passphrase: bytes | None, days: Days) -> None:
    where = "fleet"
    if not is_name(fleet.name):
        raise _bad_name(where, fleet.name)
    if not fleet.hosts:
        raise ConfigError(where, "host", "needs at least one name or address of the broker, as devices reach it")
    if wrong := [host for host in fleet.hosts if not _HOST.fullmatch(host)]:
        raise ConfigError(where, "host", f"{wrong[0]!r:.100} is no name or address of a host")
    if not 1 <= fleet.port <= 65_535:
        raise ConfigError(where, "port", "must be from 1 to 65535")
    if min(days.ca, days.root, days.publisher, days.service) < 1:
        raise ConfigError(where, "days", "must be at least 1")
    if passphrase == b"":
        raise ConfigError(where, "passphrase", "is empty; say that you want none, or give one")
    _absent(directory)


def _bad_name(what: str, name: str) -> ConfigError:
    return ConfigError(what, "name", f"{name!r:.80} is not 1-63 of a-z 0-9 - beginning with a letter or digit")


def _absent(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise ConfigError(
            str(path), "", "exists already and is never overwritten; choose another place or move it away"
        )


@contextmanager
def _all_or_nothing(final: Path) -> Iterator[Path]:
    """A private folder beside `final` that becomes it (or whose only file does) once all in it is written."""
    final = final.absolute()
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    except OSError as error:
        raise ConfigError(str(final), "", f"cannot be made: {error.strerror}") from None
    try:
        yield made
        if final.is_dir():
            final.rmdir()  # empty, or this fails
        archive = made / _ARCHIVE
        (archive if archive.exists() else made).rename(final)
    except OSError as error:
        raise ConfigError(str(final), "", f"cannot be made: {error.strerror}") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _pack(made: Path, name: str, now: float) -> None:
    """The archive of the folder `name`; on unpacking, its files belong to whoever unpacks."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mtime = int(now)
        return entry

    with open(made / _ARCHIVE, "xb", opener=_opener(_PRIVATE)) as file:
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            archive.add(made / name, arcname=name, filter=plain)
        file.flush()
        os.fsync(file.fileno())


def _write_identity(
    folder: Path, stem: str, name: str, authority: Authority, born: datetime, days: int
) -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = issue_client(authority, name, key.public_key(), born, timedelta(days=days))
    _write(folder / f"{stem}.crt", _pem(certificate))
    _write_key(folder / f"{stem}.key", key, None)
    _write(folder / "ca.crt", _pem(authority.certificate))
    return certificate


def _write_key(
    path: Path, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, passphrase: bytes | None
) -> None:
    encryption = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
    _write(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption), _PRIVATE)


def _write(path: Path, data: bytes, mode: int = _PUBLIC) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with open(path, "xb", opener=_opener(mode)) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _opener(mode: int) -> Callable[[str, int], int]:
    """A new file has its rights from the first moment on."""
    return lambda path, flags: os.open(path, flags, mode)


def _replace(path: Path, data: bytes) -> None:
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    _write(fresh, data)
    fresh.replace(path)


def _restore(path: Path, data: bytes | None) -> None:
    if data is None:
        path.unlink(missing_ok=True)
    elif path.read_bytes() != data:
        _replace(path, data)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(str(path), "", f"cannot be read: {error.strerror}; put the fleet's copy back") from None


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _seconds(moment: datetime) -> int:
    return int(moment.timestamp())


def _quoted(text: str) -> str:
    return json.dumps(text)  # for what the checks let through, JSON's strings are TOML's


def _fleet_toml(fleet: Fleet) -> str:
    hosts = ", ".join(map(_quoted, fleet.hosts))
    return f"""\
# What this fleet's folder remembers. `aggregator fleet init` wrote it.
name = {_quoted(fleet.name)}
hosts = [{hosts}]
port = {fleet.port}
prefix = {_quoted(fleet.prefix)}
message_max = {fleet.message_max}
"""


def _broker_section(fleet: Fleet, stem: str) -> str:
    return f"""\
[broker]
host = {_quoted(fleet.hosts[0])}
port = {fleet.port}
ca = "ca.crt"
cert = "{stem}.crt"
key = "{stem}.key"
prefix = {_quoted(fleet.prefix)}
# Bytes of the largest message; the broker is told the same.
message_max = {fleet.message_max}
"""


def _aggregator_toml(fleet: Fleet) -> str:
    return f"""\
# The aggregator of the fleet {fleet.name}. Paths are relative to this file's folder.

{_broker_section(fleet, "agg-0")}
[trust]
root = "root.msgpack"
signing_key = "signing.key"
# Names of denied devices, one a line; read again when it changes.
deny = "deny.txt"

[state]
directory = "state"
"""


def _registrar_toml(fleet: Fleet, port: int, bind: str) -> str:
    return f"""\
# The registrar of the fleet {fleet.name}. Paths are relative to this file's folder.

[listen]
address = {_quoted(bind)}
port = {port}

[trust]
root = "root.msgpack"
# Names of denied devices. The aggregator's `trust.deny` must name this same file.
deny = "deny.txt"
# Certificates of devices that have bundles: whoever enrols cannot take their names.
bundles = "bundles.pem"

# What devices are told of the broker.
[broker]
host = {_quoted(fleet.hosts[0])}
port = {fleet.port}
prefix = {_quoted(fleet.prefix)}
message_max = {fleet.message_max}

[state]
directory = "state"
"""


def _agent_toml(fleet: Fleet, name: str) -> str:
    return f"""\
# The edge agent of {name} in the fleet {fleet.name}. Paths are relative to this file's folder.
# `edge-agent config check` prints every setting and says what is wrong with this file.

{_broker_section(fleet, "device")}
[trust]
root = "root.msgpack"

[device]
name = "{name}"

# When this device may train. A release may ask for more than this, never for less.
#[policy]
#mains = true
#windows = ["22:00-06:00", "sat,sun 00:00-24:00"]

# SET THIS: what the device may train on. The name after `data.` is the `dataset` of a task's data contract.
# Only arrays and numbers are read, never code; the data stay on the device.
#[data.digits]
#kind = "npz"
#path = "/srv/fieldfare/digits.npz"
"""
