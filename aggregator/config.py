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


def load(path: Path, environ: Mapping[str, str] | None = None) -> AggregatorConfig:
    """The aggregator's settings from `path`, its drop-ins and `environ`; raises ConfigError."""
    return config.load(path, AggregatorConfig, environ)
