"""shared.systemd: the service manager hears each word once, and nobody listening is no error."""

import os
import socket
from pathlib import Path

import pytest

from shared.systemd import ServiceManager


class Listener:
    """A service manager's ear."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.setblocking(False)

    def heard(self) -> list[str]:
        """Everything that was said since the last call."""
        found = []
        while True:
            try:
                found.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return found

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()


def test_every_word_arrives(tmp_path: Path) -> None:
    """Ready, status, alive and stopping as systemd spells them."""
    listener = Listener(str(tmp_path / "notify"))
    manager = ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "30000000"})
    manager.ready()
    manager.alive()
    manager.stopping()
    assert listener.heard() == ["READY=1", "WATCHDOG=1", "STOPPING=1"]
    listener.close()


def test_status_is_one_line_and_said_once(tmp_path: Path) -> None:
    """A line feed would start another variable; an unchanged status costs nothing."""
    listener = Listener(str(tmp_path / "notify"))
    manager = ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "notify")})
    manager.status("training\nREADY=1")
    manager.status("training READY=1")
    manager.status("idle")
    assert listener.heard() == ["STATUS=training READY=1", "STATUS=idle"]
    listener.close()


def test_abstract_sockets_are_reached() -> None:
    """Containers get their socket with a leading @."""
    listener = Listener(f"\0fieldfare-test-{os.getpid()}")
    ServiceManager({"NOTIFY_SOCKET": f"@fieldfare-test-{os.getpid()}"}).ready()
    assert listener.heard() == ["READY=1"]
    listener.close()


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": "/nonexistent/x"}, {"NOTIFY_SOCKET": "vsock:2:1"}])
def test_without_a_manager_nothing_happens(environ: dict[str, str]) -> None:
    """The daemon runs as well from a shell."""
    manager = ServiceManager(environ)
    manager.ready()
    manager.status("x")
    manager.alive()
    manager.stopping()
    assert manager.watchdog is None


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_watchdog_is_fed_at_half_its_time(environ: dict[str, str], seconds: float | None) -> None:
    """Only if it watches this very process."""
    assert ServiceManager(environ).watchdog == seconds
