"""The agent's door for the operator: a Unix socket that answers `status`, `pause` and `resume`.

One request a connection: a line of JSON in, a line of JSON out, both bounded and with deadlines. The server's thread
only posts `ControlRequest` and waits for the owner to call its `reply`; it never looks at the agent's state. Who may
open the socket (mode 0660, in the runtime directory) may ask. No TCP port is opened.
"""

import contextlib
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from shared.errors import ConfigError, LinkError
from shared.messages import Wire

SOCKET = "control.sock"
REQUEST_MAX = 4096
ANSWER_MAX = 1 << 20
PATIENCE = 5.0
"""Seconds that the owner has for an answer; the client waits twice as long."""
HURRY = 1.0
"""Seconds in which a client must have asked: until then it keeps others waiting."""

Reply = Callable[[Mapping[str, object]], None]


class Request(Wire, frozen=True):
    """What may be asked. `seconds` says how long to pause; None: until `resume`."""

    verb: Literal["status", "pause", "resume"]
    seconds: Annotated[float, Meta(gt=0.0, le=31_536_000.0)] | None = None


@dataclass(frozen=True, slots=True)
class ControlRequest:
    """The event posted for each request; the owner calls `reply` once, which never blocks. {"error": text} refuses."""

    request: Request
    reply: Reply


class ControlServer:
    """Listens in `run_dir` from `start` to `stop`."""

    def __init__(self, run_dir: Path, post: Callable[[ControlRequest], None]) -> None:
        self._path = run_dir / SOCKET
        self._post = post
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Open the socket, in place of one that a dead agent left; ConfigError if the folder cannot hold one."""
        if _answers(self._path):
            raise self._error("another agent uses this folder; stop it or set another run_dir")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.unlink(missing_ok=True)
            listener.bind(str(self._path))
            os.chmod(self._path, 0o660)
            listener.listen(8)
        except OSError as error:
            listener.close()
            raise self._error(f"no socket can be opened there: {error.strerror or error}") from None
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
        self._path.unlink(missing_ok=True)

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                answer = self._answer(_receive(connection, REQUEST_MAX, HURRY))
                connection.settimeout(HURRY)
                connection.sendall(_line(answer))

    def _answer(self, line: bytes) -> Mapping[str, object]:
        try:
            request = msgspec.json.decode(line, type=Request, strict=True)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return {"error": f"not a request: {error}"}
        answers: queue.SimpleQueue[Mapping[str, object]] = queue.SimpleQueue()
        self._post(ControlRequest(request, answers.put))
        try:
            return answers.get(timeout=PATIENCE)
        except queue.Empty:
            return {"error": "the agent is busy and did not answer in time"}

    def _error(self, advice: str) -> ConfigError:
        return ConfigError(str(self._path.parent), "device.run_dir", advice)


def ask(run_dir: Path, request: Request) -> dict[str, Any]:
    """The running agent's answer; LinkError says why there is none."""
    path = run_dir / SOCKET
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(2 * PATIENCE)
            connection.connect(str(path))
            connection.sendall(_line(msgspec.to_builtins(request)))
            line = _receive(connection, ANSWER_MAX, 2 * PATIENCE)
    except (FileNotFoundError, ConnectionRefusedError):
        start = "`edge-agent run` or `systemctl start edge-agent` starts it"
        raise LinkError(f"the agent is not running (nothing listens at {path}); {start}") from None
    except PermissionError:
        raise LinkError(f"no permission to ask the agent at {path}; try as root or as a member of its group") from None
    except TimeoutError:
        raise LinkError(f"the agent at {path} does not answer") from None
    except OSError as error:
        raise LinkError(f"the agent at {path} cannot be asked: {error.strerror or error}") from None
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise LinkError(f"what listens at {path} is no agent, or it stopped while it answered")
    if "error" in answer:
        raise LinkError(str(answer["error"]))
    return answer


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PATIENCE)
        try:
            probe.connect(str(path))
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
