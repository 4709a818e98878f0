"""A daemon's door for the operator: a Unix socket that takes typed requests.

One request a connection: a line of JSON in, a line of JSON out, both bounded and with deadlines. The server's thread
only posts `ControlRequest` and waits for the owner to call its `reply`; it never looks at the daemon's state. A request
whose asker has gone is not carried out, unless the owner has begun. Who may open the socket (mode 0660, in a folder of
the daemon's) may ask. No TCP port is opened.
"""

import contextlib
import json
import os
import queue
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from shared.errors import ConfigError, LinkError
from shared.messages import Wire

SOCKET = "control.sock"
REQUEST_MAX = 4096
ANSWER_MAX = 1 << 20
PATIENCE = 5.0
"""Seconds in which the owner must begin; it has nearly as long for the answer then. The client waits twice as long."""
_MAYBE = "; what was asked may still be done, so look before you ask again"
HURRY = 1.0
"""Seconds in which a client must have asked: until then it keeps others waiting."""


class NotRunning(LinkError):
    """Nobody listens at the door."""


Reply = Callable[[Mapping[str, object]], None]
R = TypeVar("R", bound=Wire)


@dataclass(frozen=True, slots=True)
class Door:
    """Which daemon it is, for people: its `name`, how it is started, and the setting that names the socket's folder."""

    name: str
    start: str
    setting: str


@dataclass(frozen=True, slots=True)
class ControlRequest(Generic[R]):
    """The event posted for each request; the owner calls `reply` once, which never blocks. {"error": text} refuses.

    Before it does anything the owner calls `begin`: False means that nobody waits for it any more.
    """

    request: R
    reply: Reply
    _taken: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> bool:
        """Whether the caller is the first to call this: the owner who works, or the door that gives up."""
        return self._taken.acquire(blocking=False)


class ControlServer(Generic[R]):
    """Listens in `folder` from `start` to `stop`; requests are of `kind`."""

    def __init__(self, folder: Path, kind: type[R], door: Door, post: Callable[[ControlRequest[R]], None]) -> None:
        self._folder, self._kind, self._door, self._post = folder, kind, door, post
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Open the socket, in place of one that a dead daemon left; ConfigError if the folder cannot hold one."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _address(self._folder) as address:
                if _answers(address):
                    raise self._error(f"another {self._door.name} uses this folder; stop it or set another one")
                (self._folder / SOCKET).unlink(missing_ok=True)
                listener.bind(address)
                os.chmod(self._folder / SOCKET, 0o660)
            listener.listen(8)
        except OSError as error:
            listener.close()
            raise self._error(f"no socket can be opened there: {error.strerror or error}") from None
        except ConfigError:
            listener.close()
            raise
        self._socket = listener
        self._thread = threading.Thread(target=self._serve, args=(listener,), name="control", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close the socket, remove it and wait for the thread."""
        if self._socket is None or self._thread is None:
            return
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._thread.join(2 * PATIENCE)
        self._socket.close()
        self._socket = None
        (self._folder / SOCKET).unlink(missing_ok=True)

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                line = _receive(connection, REQUEST_MAX, HURRY)
                if _gone(connection):
                    continue  # it waited too long for its turn
                answer = self._answer(line)
                connection.settimeout(HURRY)
                connection.sendall(_line(answer))

    def _answer(self, line: bytes) -> Mapping[str, object]:
        try:
            request = msgspec.json.decode(line, type=self._kind, strict=True)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return {"error": f"not a request: {error}"}
        answers: queue.SimpleQueue[Mapping[str, object]] = queue.SimpleQueue()
        posted = ControlRequest(request, answers.put)
        self._post(posted)
        try:
            return answers.get(timeout=PATIENCE)
        except queue.Empty:
            if posted.begin():
                text = f"the {self._door.name} is busy and did not begin in time; nothing was done, try again"
                return {"error": text, "busy": True}
        try:
            return answers.get(timeout=0.8 * PATIENCE)
        except queue.Empty:
            return {"error": f"the {self._door.name} is busy and did not answer in time{_MAYBE}", "pending": True}

    def _error(self, advice: str) -> ConfigError:
        return ConfigError(str(self._folder), self._door.setting, advice)


def ask(folder: Path, request: Wire, door: Door) -> dict[str, Any]:
    """The running daemon's answer, which may be {"error": text}; LinkError says why there is none (NotRunning).

    With "pending" beside the error nobody knows whether what was asked is done.
    """
    path, name, asked = folder / SOCKET, door.name, False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, _address(folder) as address:
            connection.settimeout(2 * PATIENCE)
            connection.connect(address)
            connection.sendall(_line(msgspec.to_builtins(request)))
            asked = True
            line = _receive(connection, ANSWER_MAX, 2 * PATIENCE)
    except (FileNotFoundError, ConnectionRefusedError):
        raise NotRunning(f"the {name} is not running (nothing listens at {path}); {door.start}") from None
    except PermissionError:
        raise LinkError(f"no permission to ask the {name} at {path}; try as root or as a member of its group") from None
    except TimeoutError:
        if asked:
            return {"error": f"the {name} at {path} does not answer{_MAYBE}", "pending": True}
        raise LinkError(f"the {name} at {path} does not answer") from None
    except OSError as error:
        raise LinkError(f"the {name} at {path} cannot be asked: {error.strerror or error}") from None
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise LinkError(f"what listens at {path} is no {name}, or it stopped while it answered")
    if answer.get("busy"):
        raise LinkError(str(answer.get("error")))
    return answer


@contextlib.contextmanager
def _address(folder: Path) -> Iterator[str]:
    """The socket's address by way of its open folder: a path of more than 107 bytes would not fit."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{opened}/{SOCKET}"
    finally:
        os.close(opened)


def _gone(connection: socket.socket) -> bool:
    """Whether the other side has closed, and not only said all that it had to say."""
    poll = select.poll()
    poll.register(connection, select.POLLHUP)
    return bool(poll.poll(0))


def _answers(address: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PATIENCE)
        try:
            probe.connect(address)
        except OSError:
            return False
        return True


def _line(message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _receive(connection: socket.socket, limit: int, seconds: float) -> bytes:
    """Up to the first line feed, the other side's end, or `limit` bytes; TimeoutError after `seconds` in all."""
    found = bytearray()
    end = time.monotonic() + seconds
    while len(found) < limit and b"\n" not in found:
        connection.settimeout(max(0.001, end - time.monotonic()))
        piece = connection.recv(min(65_536, limit - len(found)))
        if not piece:
            break
        found += piece
    return bytes(found.partition(b"\n")[0])
