"""What the operator may ask of the agent by its door (shared.control): `status`, `why`, `pause`, `resume`, `probe`.

`probe` has it publish its own status and tell what the broker answers, since only that proves that it may.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from shared import control
from shared.cli import Exit, Failure
from shared.control import Door
from shared.errors import LinkError
from shared.messages import Wire

DOOR = Door("agent", "`edge-agent run` or `systemctl start edge-agent` starts it", "device.run_dir")


class Request(Wire, frozen=True):
    """What may be asked. `seconds` says how long to pause, None: until `resume`; `task` whom `why` is about."""

    verb: Literal["status", "why", "pause", "resume", "probe"]
    seconds: Annotated[float, Meta(gt=0.0, le=31_536_000.0)] | None = None
    task: Annotated[str, Meta(max_length=64)] | None = None


ControlRequest = control.ControlRequest[Request]


def server(run_dir: Path, post: Callable[[ControlRequest], None]) -> control.ControlServer[Request]:
    """The agent's door in `run_dir`."""
    return control.ControlServer(run_dir, Request, DOOR, post)


def ask(run_dir: Path, request: Request) -> dict[str, Any]:
    """The running agent's answer; LinkError says why there is none or why it refuses, Failure that it came too late."""
    answer = control.ask(run_dir, request, DOOR)
    if answer.get("pending"):
        raise Failure(Exit.TIMED_OUT, str(answer["error"]))
    if "error" in answer:
        raise LinkError(str(answer["error"]))
    return answer
