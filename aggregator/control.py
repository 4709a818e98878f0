"""What the operator may ask of the running aggregator, and of the running registrar, by its door (shared.control)."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, field

from shared import control
from shared.cli import Exit, Failure
from shared.control import Door
from shared.messages import Name, Uint, Wire

DOOR = Door("aggregator", "`aggregator run` or `systemctl start aggregator` starts it", "state.directory")


class Request(Wire, frozen=True):
    """Something for a task; `to` is the number of the release that a rollback brings back (None: the one before).

    "devices" is about no task: a page of the devices whose names come after `after`, with `waiting` only those that are
    here and do not train; `more` in its answer says that it goes on.
    """

    verb: Literal["pause", "resume", "stop", "rollback", "devices"]
    task: Name | None = None
    to: Uint | None = None
    after: Annotated[str, Meta(max_length=64)] = ""
    waiting: bool = False


ControlRequest = control.ControlRequest[Request]


def server(state: Path, post: Callable[[ControlRequest], None]) -> control.ControlServer[Request]:
    """The aggregator's door in its state directory."""
    return control.ControlServer(state, Request, DOOR, post)


def ask(state: Path, request: Request) -> dict[str, Any]:
    """The running aggregator's answer; LinkError says why there is none, Failure why it says no, or nothing in time."""
    return _answered(control.ask(state, request, DOOR))


# -- the registrar -------------------------------------------------------------------------------------------------

REGISTRAR = Door("registrar", "`aggregator registrar run` or `systemctl start registrar` starts it", "state.directory")


class RegistrarRequest(Wire, frozen=True, kw_only=True):
    """Something about tokens or devices; a list begins after `name`, and `more` in its answer says that it goes on.

    "denied": the deny list has changed; `name` is who came onto it.
    """

    verb: Literal["token create", "token list", "token revoke", "device list", "device show", "device label", "denied"]
    name: Annotated[str, Meta(max_length=64)] = ""
    seconds: Annotated[int, Meta(ge=1, le=366 * 86_400)] = 86_400
    labels: Annotated[list[Annotated[str, Meta(max_length=128)]], Meta(max_length=16)] = field(default_factory=list)
    again: bool = False


RegistrarControl = control.ControlRequest[RegistrarRequest]


def registrar_server(state: Path, post: Callable[[RegistrarControl], None]) -> control.ControlServer[RegistrarRequest]:
    """The registrar's door in its state directory."""
    return control.ControlServer(state, RegistrarRequest, REGISTRAR, post)


def ask_registrar(state: Path, request: RegistrarRequest) -> dict[str, Any]:
    """The running registrar's answer; raises as `ask` does."""
    return _answered(control.ask(state, request, REGISTRAR))


def _answered(answer: dict[str, Any]) -> dict[str, Any]:
    if answer.get("pending"):
        raise Failure(Exit.TIMED_OUT, str(answer["error"]))
    if "error" in answer:
        raise Failure(Exit.REFUSED, str(answer["error"]))
    return answer
