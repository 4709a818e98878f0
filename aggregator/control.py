"""What the operator may ask of the running aggregator by its door (shared.control)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from shared import control
from shared.cli import Exit, Failure
from shared.control import Door
from shared.messages import Name, Uint, Wire

DOOR = Door("aggregator", "`aggregator run` or `systemctl start aggregator` starts it", "state.directory")


class Request(Wire, frozen=True):
    """Something for a task; `to` is the number of the release that a rollback brings back (None: the one before)."""

    verb: Literal["pause", "resume", "stop", "rollback"]
    task: Name
    to: Uint | None = None


ControlRequest = control.ControlRequest[Request]


def server(state: Path, post: Callable[[ControlRequest], None]) -> control.ControlServer[Request]:
    """The aggregator's door in its state directory."""
    return control.ControlServer(state, Request, DOOR, post)


def ask(state: Path, request: Request) -> dict[str, Any]:
    """The running aggregator's answer; LinkError says why there is none, Failure why it says no, or nothing in time."""
    answer = control.ask(state, request, DOOR)
    if answer.get("pending"):
        raise Failure(Exit.TIMED_OUT, str(answer["error"]))
    if "error" in answer:
        raise Failure(Exit.REFUSED, str(answer["error"]))
    return answer
