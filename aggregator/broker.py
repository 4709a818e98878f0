"""The broker's configuration out of the templates in mosquitto/, and a broker as a child of this process.

The child is for demo and tests; a fleet's broker is a service of its own. Nothing here opens a connection to it.
"""

import os
import random
import re
import shutil
import socket
import string
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import TracebackType
from typing import Literal, Self

from shared.errors import ConfigError, LinkError, LocalProtocolError

MESSAGE_MAX = 64 << 20
"""Bytes of the largest message, unless told otherwise; the default of both daemons too."""

_OVERHEAD = 128 << 10
"""Bytes that a packet's topic (65,535 at most), properties and header add to its payload, rounded up."""

_TEMPLATES = Path(__file__).parent / "_mosquitto"
_PREFIX = re.compile(r"[a-zA-Z0-9_-]{1,32}(/[a-zA-Z0-9_-]{1,32}){0,3}")
_START_SECONDS = 10.0
_DESCRIPTORS = 65_536


class _Template(string.Template):
    delimiter = "@"  # `$SYS` is a topic and `%u` a pattern


Version = Literal["2.0", "2.1"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the templates leave open. Paths are those of the broker's host."""

    home: PurePath
    """Where mosquitto.conf, acl, ca.crt, server.crt and server.key lie."""
    data: PurePath
    """Where mosquitto keeps its state; it must exist and belong to `user`."""
    port: int = 8883
    bind: str = ""
    """The address to listen on; every one of the host's when empty."""
    user: str = "mosquitto"
    prefix: str = "fl"
    """Of every topic but the models'; the same on devices and aggregator."""
    message_max: int = MESSAGE_MAX
    """Bytes of the largest payload."""
    queued_max: int = 1 << 30
    """Bytes that may wait for one client."""
    version: Version = "2.0"
    """Of mosquitto; what is rendered for 2.0 also starts 2.1."""
    crl: bool = False
    """Whether ca.crl lies in `home` too: without the file mosquitto would not start then."""
    autosave: int = 300
    """Seconds between two savings of the state; not below 300 in a fleet, because saving stalls the broker."""


def render(settings: Settings) -> dict[str, str]:
    """The texts of `mosquitto.conf` and `acl`; raises ConfigError for a value that would change their meaning."""
    if not _PREFIX.fullmatch(settings.prefix) or settings.prefix.split("/")[0] == "models":
        raise ConfigError(
            "broker", "prefix", "one to four words of a-z A-Z 0-9 _ - joined by /, the first not `models`"
        )
    values = {
        "home": _path(settings.home),
        "data": _path(settings.data),
        "listener": f"{settings.port} {_word('bind', settings.bind)}".strip(),
        "user": _word("user", settings.user),
        "prefix": settings.prefix,
        "protocols": f"{'' if settings.version == '2.1' else '#'}accept_protocol_versions 5",
        "crlfile": f"{'' if settings.crl else '#'}crlfile {_path(settings.home)}/ca.crl",
        "message_max": f"{settings.message_max:,}",
        "packet_max": str(settings.message_max + _OVERHEAD),
        "queued_max": str(settings.queued_max),
        "autosave": str(settings.autosave),
    }
    return {name: _Template(_template(name)).substitute(values) for name in ("mosquitto.conf", "acl")}


def render_units(settings: Settings, crl: PurePath | None = None) -> dict[str, str]:
    """What makes systemd's own mosquitto.service run this configuration, by file name.

    `crl` is where the registrar writes its list on the broker's host; then two more units hand it on when it changes.
    """
    home = _unit_path(settings.home)
    command = f"/usr/bin/install -m 0644 {_unit_path(crl)} {home}/ca.crl" if crl is not None else ""
    first = f"ExecStartPre=+{command}\n" if crl is not None else ""
    units = {
        "mosquitto.service.d/fieldfare.conf": f"""\
# /etc/systemd/system/mosquitto.service.d/fieldfare.conf: `aggregator broker render` wrote it.
[Service]
{first}ExecStart=
ExecStart=/usr/sbin/mosquitto -c {home}/mosquitto.conf
# A descriptor for each client; the usual 1024 turn the next device away.
LimitNOFILE={_DESCRIPTORS}
"""
    }
    if crl is not None:
        units["fieldfare-crl.path"] = f"""\
# /etc/systemd/system/fieldfare-crl.path: `aggregator broker render` wrote it.
[Unit]
Description=Watch the list of revoked Fieldfare devices

[Path]
PathChanged={_unit_path(crl)}

[Install]
WantedBy=multi-user.target
"""
        units["fieldfare-crl.service"] = f"""\
# /etc/systemd/system/fieldfare-crl.service: `aggregator broker render` wrote it.
[Unit]
Description=Give the broker the list of revoked Fieldfare devices

[Service]
Type=oneshot
ExecStart={command}
ExecStart=/usr/bin/systemctl try-reload-or-restart mosquitto.service
"""
    return units


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on now."""
    # Below the range that systems take for outgoing connections: one of those could hold it when the broker comes back.
    for port in random.sample(range(20_000, 32_000), 100):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
    raise LinkError("no free TCP port between 20000 and 32000 on 127.0.0.1")


class Broker:
    """A mosquitto that is this process's child, run from a folder with a rendered mosquitto.conf; its log is there too.

    It may be started again after `stop` or `kill`: same port, same state. Used as a context it stops at the end.
    """

    def __init__(self, home: Path, port: int, program: str = "mosquitto") -> None:
        self.home = home
        self.port = port
        self.log = home / "mosquitto.log"
        self._program = program
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        return self._child.pid if self._child is not None and self._child.poll() is None else None

    def start(self) -> None:
        """Return once it accepts connections; raises LinkError with the end of its log if it does not."""
        if self.pid is not None:
            raise LocalProtocolError("the broker runs already")
        # Debian puts it into a folder that is not on every user's path.
        program = shutil.which(self._program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
        if program is None:
            raise LinkError(f"there is no {self._program} on this machine: sudo apt-get install mosquitto")
        # It dies with this process, whatever ends that, where the system can promise it.
        leash = [found, "--pdeathsig", "KILL", "--"] if (found := shutil.which("setpriv")) else []
        # A session of its own: Ctrl-C reaches this process alone, which ends the broker after those that need it.
        with self.log.open("ab") as log:
            before = log.tell()
            self._child = subprocess.Popen(
                [*leash, program, "-c", str(self.home / "mosquitto.conf")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + _START_SECONDS
        # Its word in the log, not a connection: another broker may listen on this port.
        while b" running\n" not in self.log.read_bytes()[before:]:
            if self._child.poll() is not None or time.monotonic() > end:
                self.kill()
                raise LinkError(f"mosquitto did not start; the end of {self.log}:\n{self._tail()}")
            time.sleep(0.01)

    def stop(self) -> None:
        """End it as a service manager would; it saves its state. Nothing happens if it does not run."""
        if self._child is None:
            return
        self._child.terminate()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it at once, as a power cut would: it saves nothing and publishes no wills."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-10:])


def _template(name: str) -> str:
    try:
        return (_TEMPLATES / name).read_text(encoding="utf-8")
    except OSError as error:
        advice = "install Fieldfare again (a checkout needs symbolic links)"
        raise ConfigError(str(_TEMPLATES / name), "", f"cannot be read: {error.strerror}; {advice}") from None


def _path(path: PurePath) -> str:
    # mosquitto takes the rest of a line as the value, so a blank is fine and a line break is another setting.
    text = str(path)
    if any(ord(letter) < 32 for letter in text) or text != text.strip() or not path.is_absolute():
        raise ConfigError(text, "", "must be an absolute path without control characters")
    return text


def _unit_path(path: PurePath) -> str:
    # systemd splits at blanks and replaces what follows a %.
    text = _path(path)
    if not re.fullmatch(r"/[A-Za-z0-9._/+@=-]*", text):
        raise ConfigError(text, "", "must be of a-z A-Z 0-9 . _ / + @ = - to stand in a unit")
    return text


def _word(key: str, text: str) -> str:
    if text and not re.fullmatch(r"[A-Za-z0-9._:%-]+", text):
        raise ConfigError("broker", key, f"{text!r} is not one word")
    return text
