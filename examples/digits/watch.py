"""What the demo sees of the fleet: its releases and offers as the operator hears them, its devices as they answer."""

import time
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self

from edge_agent import control
from examples.digits.place import Place
from examples.digits.processes import DemoError
from examples.digits.report import DeviceRecord
from shared.errors import LinkError
from shared.mqtt import Link, LinkBroken, LinkEvent, LinkSettings, LinkUp, Message
from shared.topics import task_release, task_round


class Ear:
    """An operator's connection that hears every release and offer of a task, each with the second it came."""

    def __init__(self, settings: LinkSettings, task: str) -> None:
        self.release, self.offer = task_release(task), task_round(task)
        self._heard: SimpleQueue[tuple[float, LinkEvent]] = SimpleQueue()
        self._link = Link(settings, self)

    def post(self, event: LinkEvent) -> None:
        """The link's thread leaves an event."""
        self._heard.put((time.monotonic(), event))

    def post_payload(self, event: LinkEvent, size: int) -> None:
        """Likewise; a demo's messages are few and small."""
        self.post(event)

    def listen(self, seconds: float) -> list[tuple[float, Message]]:
        """All that came, after at most `seconds`: (monotonic second of arrival, message)."""
        found: list[tuple[float, Message]] = []
        while True:
            try:
                at, event = self._heard.get(timeout=0 if found else seconds)
            except Empty:
                return found
            match event:
                case LinkUp():
                    self._link.subscribe(self.release, self.offer)
                case LinkBroken(cause):
                    raise DemoError(f"the demo's own connection failed: {cause}")
                case Message():
                    found.append((at, event))
                case _:
                    pass  # a lost link comes back by itself, and a dead broker is noticed elsewhere

    def __enter__(self) -> Self:
        self._link.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._link.stop()


def ask(place: Place, device: DeviceRecord) -> None:
    """Ask a device's agent how it is, as `edge-agent status --json` does; one that does not answer stays as it was."""
    try:
        told = control.ask(place.run_dir(device.name), control.Request("status"))
    except LinkError:
        return
    link, memory, counts = told["link"], told["memory"], told["counts"]
    device.state = told["state"] if link["connected"] else "not connected"
    device.round = max((task["last_round_trained"] for task in told["tasks"].values()), default=0)
    updates, up, down = device.before
    device.updates = updates + counts.get("updates_accepted", 0)
    device.bytes_up, device.bytes_down = up + link["bytes_sent"], down + link["bytes_received"]
    device.agent_memory = max(device.agent_memory, memory["agent"] or 0)
    device.trainer_memory = max(device.trainer_memory, memory["trainer"] or 0)
