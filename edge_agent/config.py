"""The agent's settings: one frozen struct with every default, its unit and its reason.

It describes and checks; it never acts on a setting.
"""

from collections.abc import Mapping
from datetime import tzinfo
from pathlib import Path
from typing import Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from msgspec import Meta

from edge_agent.eligibility import Bytes, Policy, Seconds
from edge_agent.quality import Quality
from shared import config
from shared.chunks import INLINE_MAX
from shared.config import BrokerSection, LogSection, ReadableFile, Section
from shared.errors import ConfigError
from shared.messages import Name


class Broker(BrokerSection, frozen=True):
    """Section [broker]: the connection of a device."""

    cert: ReadableFile = Path("device.crt")
    key: ReadableFile = Path("device.key")
    """PEM; the certificate's common name is the device's name."""
    connect_timeout: Annotated[int, Meta(ge=1, le=300)] = 20
    """Seconds for TCP and TLS: mobile links take long to wake."""
    inline_max: Annotated[int, Meta(ge=0, le=1 << 30)] = INLINE_MAX
    """Bytes up to which an update's body rides along with its head; larger ones go in the chunks that are asked for."""


class Device(Section, frozen=True):
    """Section [device]: who and where this is."""

    name: Name | None = None
    """By default the certificate's common name, and never another."""
    state_dir: Path = Path("/var/lib/fieldfare-agent")
    """What must survive a reboot: highest versions, newest release, updates on their way."""
    run_dir: Path = Path("/run/fieldfare-agent")
    """The socket of `edge-agent status`."""
    outbox_updates: Annotated[int, Meta(ge=1, le=1024)] = 16
    """Updates that wait for the aggregator's answer at most; the oldest makes room."""
    outbox_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 40)] = 256 << 20
    """Bytes of their bodies together, the newest apart: the disk is the owner's."""
    models: Path | None = None
    """Where programs on this device find the newest good model of each task; by default models/ in state_dir."""
    sys_root: Path = Path("/sys")
    proc_root: Path = Path("/proc")
    """Where power, temperature, pressure and memory are read; other roots are for tests and demonstrations."""

    @property
    def shelf(self) -> Path:
        """The folder of models, told or the usual one."""
        return self.models or self.state_dir / "models"


class Trust(Section, frozen=True):
    """Section [trust]."""

    root: ReadableFile = Path("root.msgpack")
    """The fleet's root record, pinned here when the device was set up: it names who may publish."""


class Enrol(Section, frozen=True):
    """Section [enrol]: how the certificate is renewed; `edge-agent enrol` writes it into a drop-in."""

    url: Annotated[str, Meta(pattern=r"^(https://[A-Za-z0-9._\[\]:-]{1,260}/?)?$")] = ""
    """The registrar, as https://HOST:PORT; empty: nothing is renewed, a bundle lasts as long as it lasts."""
    renew_at: Annotated[float, Meta(ge=0.1, le=0.95)] = 0.66
    """Of a certificate's life is over when it is renewed; a twentieth earlier at random, so that a fleet spreads."""
    retry: Annotated[float, Meta(ge=1.0, le=86_400.0)] = 60.0
    """Seconds until a registrar that did not answer is asked again, doubled each time ..."""
    retry_max: Annotated[float, Meta(ge=1.0, le=604_800.0)] = 3600.0
    """... up to this."""
    timeout: Annotated[float, Meta(ge=1.0, le=300.0)] = 20.0
    """Seconds for each step of a connection to it."""


class Trainer(Section, frozen=True):
    """Section [trainer]: the child process that trains."""

    threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    """CPU threads; 0: all CPUs this process may use but one, at least one, so that the device stays responsive."""
    memory_max: Bytes = 2 << 30
    """Bytes of private memory that the trainer may take before it fails; 0: no limit of ours."""
    timeout: Annotated[float, Meta(ge=1.0, le=604_800.0)] = 3600.0
    """Seconds for one round's training: a valid graph can still ask for too much."""
    idle_exit: Seconds = 120.0
    """Seconds that an idle trainer is kept warm: a start costs 2 CPU-seconds, an idle one 220 MB."""
    python: Path | None = None
    """The interpreter that has torch; by default the agent's own."""
    nice: Annotated[int, Meta(ge=0, le=19)] = 10
    """Scheduling niceness of the trainer: whatever else the device does comes first."""
    scheduling: Literal["idle", "normal"] = "idle"
    """"idle": the trainer gets CPU time and the disk only when nobody else wants them; "normal": niceness alone."""
    checkpoint: Annotated[float, Meta(ge=0.0, le=604_800.0)] = 300.0
    """Seconds of training between two checkpoints, for when the power fails: each writes the weights and what the
    optimizer keeps, up to three times their size. 0: only when training steps aside or the agent stops."""


class Data(Section, frozen=True):
    """Section [data.NAME]: where this device keeps the data set that tasks call NAME."""

    path: Path
    """A file, or a folder of files; it may appear later, so it is not looked at when the agent starts."""
    kind: Literal["npz", "csv"] | None = None
    """By default the path's suffix decides."""

    def __post_init__(self) -> None:
        if self.kind is None and self.path.suffix not in (".npz", ".csv"):
            raise ValueError(f'kind must be "npz" or "csv", because the name of {self.path} does not say')

    @property
    def format(self) -> Literal["npz", "csv"]:
        """The kind, told or found by the suffix."""
        return self.kind or ("csv" if self.path.suffix == ".csv" else "npz")


class AgentConfig(Section, frozen=True):
    """All of agent.toml."""

    broker: Broker
    device: Device = Device()
    trust: Trust = Trust()
    enrol: Enrol = Enrol()
    policy: Policy = Policy()
    trainer: Trainer = Trainer()
    local: Quality = Quality()
    data: Annotated[dict[Name, Data], Meta(max_length=256)] = msgspec.field(default_factory=dict)
    """Data sets by the name that tasks use; a device without the set of a task takes no part in it."""
    log: LogSection = LogSection()


def load(path: Path, environ: Mapping[str, str] | None = None, files: bool = True) -> AgentConfig:
    """The agent's settings from `path`, its drop-ins and `environ`; raises ConfigError.

    Without `files` the keys need not be readable: whoever may ask the running agent need not be its user.
    """
    found = config.load(path, AgentConfig, environ, files=files)
    try:
        zone(found.policy.timezone)
    except ValueError as error:
        raise ConfigError(str(path), "policy.timezone", str(error)) from None
    return found


def encrypted(key: Path) -> Path | None:
    """Where `key` lies encrypted instead, as docs/howto/install.md has it: only the unit gets to see it in plain."""
    there = beside(key)
    return there if there.exists() and not key.exists() else None


def beside(key: Path) -> Path:
    """The file for what systemd-creds makes of a key."""
    return key.with_name(f"{key.name}.cred")


def zone(name: str, localtime: Path = Path("/etc/localtime")) -> tzinfo:
    """The time zone called `name`; "" is the device's own, UTC where it has none. ValueError for an unknown name."""
    if name:
        try:
            return ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f'{name!r} is no time zone; write an IANA name such as "Europe/Berlin"') from None
    try:
        with localtime.open("rb") as file:
            return ZoneInfo.from_file(file, key="localtime")
    except (OSError, ValueError):
        return ZoneInfo("UTC")
