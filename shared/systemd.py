"""What a daemon tells its service manager: ready, one line of status, alive, stopping.

Off systemd every call does nothing. It never fails: a manager that does not listen must not stop the daemon.
"""

import os
import socket
from collections.abc import Mapping


class ServiceManager:
    """The service manager that `environ` names. Not for child processes: the unit listens to its main process only."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._watchdog = _interval(environ)
        self._status = ""

    @property
    def watchdog(self) -> float | None:
        """Seconds after which `alive` must have been called, half of what the manager allows; None: no watchdog."""
        return self._watchdog

    def ready(self) -> None:
        """The daemon has started."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """The one line that `systemctl status` shows; sent only when it differs from the one before."""
        line = " ".join(text.split())
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def alive(self) -> None:
        """Feed the watchdog."""
        if self._watchdog is not None:
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """The daemon is on its way out."""
        self._send("STOPPING=1")

    def _send(self, line: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
                channel.settimeout(1.0)
                channel.sendto(line.encode(), self._address)
        except OSError:
            pass  # there is nobody left to tell


def _address(name: str) -> str | None:
    """The socket's address: a path, or with a leading @ an abstract one."""
    if name.startswith("@"):
        return "\0" + name[1:]
    return name if name.startswith("/") else None


def _interval(environ: Mapping[str, str]) -> float | None:
    allowed, process = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not allowed.isdecimal() or int(allowed) == 0 or (process and process != str(os.getpid())):
        return None
    return int(allowed) / 2e6
