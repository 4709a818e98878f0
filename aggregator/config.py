"""The aggregator's configuration: one TOML file into frozen structs, with every default, its unit and its reason.

It describes and checks; it never opens a key or a connection.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from shared import config
from shared.config import BrokerSection, LogSection, ReadableFile, Section


class Broker(BrokerSection, frozen=True):
    """`[broker]`: the connection of the aggregator."""

    cert: ReadableFile = Path("agg-0.crt")
    """PEM of the certificate named _agg-<shard>."""
    key: ReadableFile = Path("agg-0.key")
    """PEM of its private key, readable only by the service."""
    connect_timeout: Annotated[int, Meta(ge=1, le=300)] = 10
    """Seconds for TCP and TLS."""


class Trust(Section, frozen=True):
    """`[trust]`: whose word is taken, and the key that gives ours."""

    root: ReadableFile = Path("root.msgpack")
    """The fleet's signed root record: it names who may publish."""
    signing_key: ReadableFile = Path("signing.key")
    """PEM of the Ed25519 key that signs offers, releases and receipts."""
    ca: ReadableFile | None = None
    """PEM of the CA that issues the devices' certificates; by default `broker.ca`."""
    deny: Path | None = None
    """Names of denied devices, one a line; read again when it changes. An absent file denies nobody."""


class State(Section, frozen=True):
    """`[state]`: what must survive a restart."""

    directory: Path = Path("/var/lib/fieldfare-aggregator")
    """Database, weights and the open rounds' keys; made with mode 0700 where it is absent."""


class Limits(Section, frozen=True):
    """`[limits]`: what received messages may cost before they are handled, and how much is kept."""

    inbound_messages: Annotated[int, Meta(ge=1, le=100_000)] = 15
    """Messages; while so many wait, the link is not read."""
    inbound_bytes: Annotated[int, Meta(ge=1 << 20, le=8 << 30)] = 23 << 20
    """Bytes, likewise; a single larger message passes alone."""
    inline_max: Annotated[int, Meta(ge=0, le=255 << 20)] = 64 << 10
    """Bytes of weights up to which our releases carry them in their one message; larger ones go out in chunks."""
    retained_bytes: Annotated[int, Meta(ge=0, le=1 << 50)] = 512 << 20
    """Bytes of chunks of one task on the broker, above which replaced releases are withdrawn before their hour."""
    keep_releases: Annotated[int, Meta(ge=2, le=10_000)] = 10
    """Newest releases of a task whose weights stay on disk, so that the task can be rolled back to them."""
    updates: Annotated[int, Meta(ge=1, le=100_000)] = 64
    """Updates that are collected from chunks at a time; more wait their turn."""
    update_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 40)] = 512 << 20
    """Bytes that these may have together: what the aggregator may need of memory for them, twice."""
    device_updates: Annotated[int, Meta(ge=1, le=1_000)] = 2
    """Of one device; it may take part in several tasks."""
    device_update_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 40)] = 256 << 20
    """Bytes, likewise: no larger update is taken."""
    waiting_updates: Annotated[int, Meta(ge=0, le=1_000_000)] = 1024
    """Updates that wait their turn, a few KiB each; who finds no place sends again later."""
    asked_chunks: Annotated[int, Meta(ge=1, le=1_000_000)] = 512
    """Chunks that are asked for at a time, of all updates together; the broker may have to hold them all."""
    chunk_timeout: Annotated[int, Meta(ge=1, le=86_400)] = 60
    """Seconds of silence after which chunks are asked for again; after half of it others may have the place."""
    update_timeout: Annotated[int, Meta(ge=1, le=864_000)] = 600
    """Seconds of silence after which an update is given up; its device sends it again."""


class AggregatorConfig(Section, frozen=True):
    """All of aggregator.toml; every path in it is absolute once loaded."""

    broker: Broker
    trust: Trust = Trust()
    state: State = State()
    limits: Limits = Limits()
    log: LogSection = LogSection()

    @property
    def device_ca(self) -> Path:
        """The CA that issues the devices' certificates."""
        return self.trust.ca or self.broker.ca

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.state.directory / "aggregator.db"

    @property
    def status_file(self) -> Path:
        """What the running aggregator says of itself: JSON, for `aggregator status`."""
        return self.state.directory / "status.json"

    @property
    def lock_file(self) -> Path:
        """Held (flock) by the one aggregator that uses this state directory."""
        return self.state.directory / "lock"


class Listen(Section, frozen=True):
    """`[listen]`: where the registrar answers, HTTPS with TLS 1.3."""

    address: Annotated[str, Meta(pattern=r"^[A-Za-z0-9.:%_-]*$", max_length=253)] = ""
    """One of this machine's; every one of them when empty."""
    port: Annotated[int, Meta(ge=1, le=65_535)] = 8443
    """Devices are given it in the registrar's URL."""
    cert: ReadableFile = Path("registrar.crt")
    """PEM of the server's certificate; it comes from the fleet's CA and names the host of that URL."""
    key: ReadableFile = Path("registrar.key")
    """PEM of its private key."""


class Authority(Section, frozen=True):
    """`[ca]`: what certificates are issued with."""

    cert: ReadableFile = Path("ca.crt")
    """PEM of the fleet's CA."""
    key: ReadableFile = Path("ca.key")
    """PEM of its private key, not encrypted: root's alone on disk, a credential for the registrar."""


class RegistrarTrust(Section, frozen=True):
    """`[trust]`: what devices pin, and who may not come in."""

    root: ReadableFile = Path("root.msgpack")
    """The fleet's signed root record, handed to each device."""
    deny: Path = Path("deny.txt")
    """Names of denied devices, one a line: the same file as the aggregator's. An absent file denies nobody."""
    bundles: ReadableFile | None = None
    """PEM of certificates that devices got in bundles, read at the start: their names are taken."""


class BrokerTold(Section, frozen=True):
    """`[broker]`: what devices are told of the broker; the registrar itself never connects to it."""

    host: Annotated[str, Meta(min_length=1, max_length=253, description="the broker's host name or address in quotes")]
    """Must be in the broker's certificate."""
    port: Annotated[int, Meta(ge=1, le=65_535)] = 8883
    """The port registered for MQTT over TLS."""
    prefix: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,32}(/[A-Za-z0-9_-]{1,32}){0,3}$")] = "fl"
    """Of every topic but the models'."""
    message_max: Annotated[int, Meta(ge=65_536, le=268_435_455)] = 64 << 20
    """Bytes of one message."""


class Certificates(Section, frozen=True):
    """`[certificates]`: how long what is issued lives. Whole seconds."""

    lifetime: Annotated[int, Meta(ge=2, le=10 * 366 * 86_400)] = 30 * 86_400
    """Renewed at two thirds. A shorter one bounds what a stolen key is worth, where the broker has no list."""
    renewable: Annotated[int, Meta(ge=0, le=10 * 366 * 86_400)] = 180 * 86_400
    """After its end: so long may a device be switched off and still come back by itself."""


class RegistrarState(Section, frozen=True):
    """`[state]`: what must survive a restart."""

    directory: Path = Path("/var/lib/fieldfare-registrar")
    """The registry and the control socket; made with mode 0700 where it is absent."""
    crl: Path | None = None
    """Where the list of revoked certificates is written for the broker; by default ca.crl in the directory."""


class RegistrarLimits(Section, frozen=True):
    """`[limits]`: what strangers may cost."""

    connections: Annotated[int, Meta(ge=1, le=10_000)] = 128
    """Open at a time."""
    address_connections: Annotated[int, Meta(ge=1, le=10_000)] = 32
    """Of one address, likewise, so that one cannot keep all others out."""
    address_burst: Annotated[int, Meta(ge=1, le=100_000)] = 100
    """Connections of one address at once. A site behind one address enrols so many devices in one go."""
    address_rate: Annotated[float, Meta(gt=0, le=10_000)] = 1.0
    """A second, for one address, after that."""
    seconds: Annotated[float, Meta(gt=0, le=300)] = 10.0
    """From a connection's first byte to its last."""


class RegistrarConfig(Section, frozen=True):
    """All of registrar.toml; every path in it is absolute once loaded."""

    broker: BrokerTold
    listen: Listen = Listen()
    ca: Authority = Authority()
    trust: RegistrarTrust = RegistrarTrust()
    certificates: Certificates = Certificates()
    state: RegistrarState = RegistrarState()
    limits: RegistrarLimits = RegistrarLimits()
    log: LogSection = LogSection()

    @property
    def crl(self) -> Path:
        """Where the list of revoked certificates is."""
        return self.state.crl or self.state.directory / "ca.crl"


def load_registrar(path: Path, environ: Mapping[str, str] | None = None, files: bool = True) -> RegistrarConfig:
    """The registrar's settings from `path`, its drop-ins and `environ`; raises ConfigError."""
    return config.load(path, RegistrarConfig, environ, files=files)


def load(path: Path, environ: Mapping[str, str] | None = None) -> AggregatorConfig:
    """The aggregator's settings from `path`, its drop-ins and `environ`; raises ConfigError."""
    return config.load(path, AggregatorConfig, environ)
