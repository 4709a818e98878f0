"""shared.control: one question, one answer, and nothing a client does hangs or harms the daemon."""

import contextlib
import json
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from edge_agent.control import ControlRequest, Request, ask, server
from shared import control
from shared.cli import Exit, Failure
from shared.control import ANSWER_MAX, REQUEST_MAX, SOCKET, ControlServer
from shared.errors import ConfigError, LinkError


def echo(event: ControlRequest) -> None:
    """An owner that answers what it was asked."""
    event.reply({"verb": event.request.verb, "seconds": event.request.seconds})


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Callable[[ControlRequest], None]], Path]]:
    """Start servers with the given owners; all are stopped in the end."""
    servers: list[ControlServer[Request]] = []

    def start(post: Callable[[ControlRequest], None]) -> Path:
        made = server(tmp_path, post)
        made.start()
        servers.append(made)
        return tmp_path

    yield start
    for made in servers:
        made.stop()


Serve = Callable[[Callable[[ControlRequest], None]], Path]


def raw(folder: Path, data: bytes) -> bytes:
    """What the server answers to these bytes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(10)
        client.connect(str(folder / SOCKET))
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65_536), b""))


def test_answer_comes_from_the_owner(serve: Serve) -> None:
    """The request arrives typed, the reply arrives whole, again and again."""
    folder = serve(echo)
    assert ask(folder, Request("status")) == {"verb": "status", "seconds": None}
    assert ask(folder, Request("pause", 7200.0)) == {"verb": "pause", "seconds": 7200.0}


def test_owner_may_refuse_with_a_reason(serve: Serve) -> None:
    """An answer with `error` is raised as one."""
    folder = serve(lambda event: event.reply({"error": "cannot pause: disk full"}))
    with pytest.raises(LinkError, match="disk full"):
        ask(folder, Request("pause"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"status\n",
        b"[]\n",
        b'{"verb": "reboot"}\n',
        b'{"verb": "status", "more": 1}\n',
        b'{"verb": "pause", "seconds": -1}\n',
        b'{"verb": "pause", "seconds": "1"}\n',
        b"\xff\xfe\n",
        b"[" * (REQUEST_MAX // 2) + b"\n",
        b"x" * (2 * REQUEST_MAX),
    ],
)
def test_what_is_no_request_is_told_so(serve: Serve, data: bytes) -> None:
    """Junk never reaches the owner, and the next client is served."""
    asked: list[ControlRequest] = []

    def post(event: ControlRequest) -> None:
        asked.append(event)
        echo(event)

    folder = serve(post)
    try:
        answer = raw(folder, data)
        assert "not a request" in json.loads(answer)["error"]
    except ConnectionResetError:
        pass  # the server had seen enough and closed with bytes unread
    assert not asked
    assert ask(folder, Request("status"))["verb"] == "status"


def test_busy_owner_and_silent_client_hold_nobody_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each connection has its deadline; after it the next one is served."""
    monkeypatch.setattr(control, "PATIENCE", 0.5)
    monkeypatch.setattr(control, "HURRY", 0.1)
    waiting: list[ControlRequest] = []
    folder = serve(waiting.append)
    with pytest.raises(LinkError, match="nothing was done"):
        ask(folder, Request("status"))
    assert not waiting[0].begin()
    waiting[0].reply({"late": True})
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.connect(str(folder / SOCKET))
        with pytest.raises(LinkError, match="nothing was done"):
            ask(folder, Request("status"))


def test_what_has_begun_may_still_be_done(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nobody says that it was refused: exit code 4; an answer that is only slow still comes."""
    monkeypatch.setattr(control, "PATIENCE", 0.5)
    slow: list[threading.Timer] = []

    def late(event: ControlRequest) -> None:
        assert event.begin()
        if event.request.verb == "status":
            slow.append(threading.Timer(0.7, event.reply, [{"late": True}]))
            slow[-1].start()

    folder = serve(late)
    assert ask(folder, Request("status")) == {"late": True}
    with pytest.raises(Failure, match="may still be done") as caught:
        ask(folder, Request("pause"))
    assert caught.value.code is Exit.TIMED_OUT
    slow[0].join()


def test_who_has_gone_is_not_served(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that waited for its turn until its asker gave up reaches nobody."""
    monkeypatch.setattr(control, "PATIENCE", 0.4)
    asked: list[str] = []
    folder = serve(lambda event: asked.append(event.request.verb))
    line = b'{"verb": "pause"}\n'
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as first,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as second,
    ):
        first.connect(str(folder / SOCKET))
        first.sendall(b'{"verb": "status"}\n')
        second.connect(str(folder / SOCKET))
        second.sendall(line)
        second.close()
        assert b"nothing was done" in first.recv(65_536)
    with pytest.raises(LinkError):
        ask(folder, Request("resume"))
    assert asked == ["status", "resume"]


def test_socket_is_for_owner_and_group(serve: Serve) -> None:
    """Strangers on the device cannot pause it."""
    mode = (serve(echo) / SOCKET).stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o660


def test_socket_of_a_dead_agent_is_replaced(serve: Serve, tmp_path: Path) -> None:
    """A crash leaves its socket behind; the next start works, and until then the client says what is the matter."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(tmp_path / SOCKET))
    with pytest.raises(LinkError, match="not running"):
        ask(tmp_path, Request("status"))
    assert ask(serve(echo), Request("status"))["verb"] == "status"


def test_second_agent_is_refused(serve: Serve) -> None:
    """Two agents in one folder would answer for each other."""
    folder = serve(echo)
    with pytest.raises(ConfigError, match="another agent"):
        server(folder, echo).start()
    assert ask(folder, Request("status"))["verb"] == "status"


def test_folder_that_can_hold_no_socket_is_a_config_error(tmp_path: Path) -> None:
    """The key to change is named."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        server(tmp_path / "file", echo).start()
    assert caught.value.key == "device.run_dir"


def test_a_folder_far_down_will_do(tmp_path: Path) -> None:
    """The system's limit of 107 bytes on a socket's path is no limit on where a state directory lies."""
    folder = tmp_path / ("x" * 120) / ("y" * 120)
    made = server(folder, echo)
    made.start()
    try:
        assert ask(folder, Request("status"))["verb"] == "status"
    finally:
        made.stop()
    assert not (folder / SOCKET).exists()


def test_stop_ends_the_thread_and_removes_the_socket(tmp_path: Path) -> None:
    """Afterwards the agent is, to a client, not running."""
    before = threading.active_count()
    made = server(tmp_path, echo)
    made.start()
    made.stop()
    made.stop()
    assert threading.active_count() == before
    with pytest.raises(LinkError, match=r"not running \(nothing listens at .*control.sock\)"):
        ask(tmp_path, Request("status"))


@pytest.mark.parametrize("answer", [b"", b"hello\n", b"[]\n", b"[" * 5000 + b"\n", b"x" * (ANSWER_MAX + 10)])
def test_client_believes_no_stranger(tmp_path: Path, answer: bytes) -> None:
    """Whatever else listens there, the client ends with one clear line."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / SOCKET))
        listener.listen()

        def serve_once() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(REQUEST_MAX)
                with contextlib.suppress(OSError):  # the client may have read enough
                    connection.sendall(answer)

        thread = threading.Thread(target=serve_once)
        thread.start()
        with pytest.raises(LinkError, match="no agent"):
            ask(tmp_path, Request("status"))
        thread.join()


def test_requests_are_closed_and_bounded() -> None:
    """The verbs are these three."""
    for verb in ("status", "pause", "resume"):
        assert msgspec.json.decode(json.dumps({"verb": verb}), type=Request).verb == verb
