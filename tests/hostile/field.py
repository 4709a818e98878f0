"""A running agent whose publisher and aggregator is the test, with their real keys on the real broker."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec import structs

from edge_agent import control
from shared import signing, wire
from shared.messages import DeviceStatus, Receipt, Release, ReleaseMessage, Role, RoundOffer, TaskManifest
from tests.broker.broker import Fleet, Peer
from tests.hostile import records
from tests.hostile.daemon import Daemon, Line, until
from tests.hostile.records import MODEL, Model

FENCE = "models/zz-fence"
AGENT = "agent"

POLICY = """
[policy]
mains = false
min_battery = 0.0
cpu_pressure = 100.0
cpu_others = 100.0
memory_pressure = 100.0
io_pressure = 100.0
memory_free = 0
disk_free = 0
settle = 0.0
"""
"""Whatever else this machine does, the agent trains."""


def configuration(fleet: Fleet, more: str = "") -> Path:
    """The agent's configuration, in its bundle's folder."""
    path = fleet.bundle(AGENT) / "agent.toml"
    path.write_text(
        f'[broker]\nhost = "localhost"\nport = {fleet.port}\n\n'
        f'[device]\nstate_dir = "state"\nrun_dir = "run"\n{POLICY}\n{more}'
    )
    return path


class Field:
    """The agent, and the test as its aggregator and publisher."""

    def __init__(self, fleet: Fleet, more: str = "", clock: Path | None = None) -> None:
        self.fleet, self.keys = fleet, records.load_keys(fleet)
        records.retire(fleet, self.keys)
        config = configuration(fleet, more)
        self.state, self._run = config.parent / "state", config.parent / "run"
        shutil.rmtree(self.state, ignore_errors=True)
        self.aggregator = Peer(fleet, fleet.aggregator)
        for topic in (f"fl/up/0/{AGENT}/#", f"fl/dev/{AGENT}/status"):
            assert self.aggregator.subscribe(topic) < 128
        self.received: list[tuple[str, bytes]] = []
        self.manifests: dict[str, TaskManifest] = {}
        self.messages: dict[str, ReleaseMessage] = {}
        self.daemon = Daemon("edge_agent", config, clock)
        self._fences = 0

    # -- doing ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the agent and wait until it hears what is published."""
        start = len(self.daemon.lines)
        self.daemon.start()
        self.daemon.wait("link.up", start)
        self.fence()

    def publish(self, topic: str, payload: bytes) -> None:
        """Publish as the aggregator."""
        assert self.aggregator.publish(topic, payload) < 128

    def task(self, name: str, version: int = 1, model: Model = MODEL, **changes: Any) -> None:
        """A publisher's release 0 of a task, accepted by the agent."""
        described = records.manifest(self.keys, name, version, model, **changes)
        self.manifests[name], self.messages[name] = described, records.release(self.keys, described, model)
        self.release(name)

    def release(self, name: str) -> None:
        """Publish the task's release and see it accepted."""
        start = len(self.daemon.read())
        self.publish(f"models/{name}/release", wire.pack(self.messages[name]))
        self.daemon.wait("release.accepted", start, task=name)
        self.fence()  # what follows from it is done as well

    def next_release(self, name: str, weights: bytes | None = None) -> None:
        """The aggregator's next release of a task, accepted; its weights are the same unless given."""
        message = self.messages[name]
        number = wire.unpack(message.release.payload, Release).number + 1
        model = MODEL if weights is None else Model(weights=weights)
        signed = records.signed_release(message.manifest, name, number, self.keys.aggregator, Role.AGGREGATOR, model)
        self.messages[name] = structs.replace(message, release=signed, weights=weights or message.weights)
        self.release(name)

    def offer(self, name: str, number: int = 1, **changes: Any) -> RoundOffer:
        """An offer of a task's newest release, published."""
        made = records.offer(self.manifests[name], self.messages[name], number, **changes)
        self.publish(f"models/{name}/round", self.signed(made))
        return made

    def signed(self, record: RoundOffer | Receipt) -> bytes:
        """A record as the aggregator publishes it."""
        return wire.pack(signing.sign(record, Role.AGGREGATOR, self.keys.aggregator))

    # -- seeing --------------------------------------------------------------------------------------------------

    def provoke(self, send: Callable[[], object], silent: bool = False) -> list[Line]:
        """All that the agent logs because of what `send` does; waits for a first line unless `silent`."""
        self.fence()
        start = len(self.daemon.lines)
        send()
        if not silent:
            until(lambda: self.daemon.read()[start:] or None, "any word of the agent")
        self.fence()
        return [line for line in self.daemon.lines[start:] if not _of_fence(line)]

    def fence(self) -> None:
        """Return when the agent is there and all that was published before has been dealt with and kept."""
        for _ in range(2):  # what follows from the first one's batch is done before the next batch begins
            self._fences += 1
            start, topic = len(self.daemon.lines), f"{FENCE}-{self._fences}/release"

            def heard(topic: str = topic) -> bool | None:
                assert self.daemon.pid
                # Its link is up before the broker has granted what it asks for; 16 says that nobody listens yet.
                return self.aggregator.publish(topic, b"\xc0") == 0 or None

            until(heard, "a subscriber")
            self.daemon.wait("message.refused", start, topic=topic)

    def asked(self) -> dict[str, Any]:
        """What `edge-agent status` shows."""
        return control.ask(self._run, control.Request("status"))

    def counters(self) -> tuple[Counter[str], Counter[str]]:
        """(refused by reason, the other counters); each line about something refused is one count, and the reverse."""
        told = Counter(line["reason"] for line in self.daemon.read() if line["event"] == "message.refused")
        shown = self.asked()
        assert Counter(shown["refused"]) == told
        fences = sum(map(_of_fence, self.daemon.lines))
        return +(told - Counter({"wrong_type": fences})), Counter(shown["counts"])

    def snapshot(self) -> dict[str, bytes]:
        """All that the agent keeps."""
        return {
            str(path.relative_to(self.state)): path.read_bytes()
            for path in sorted(self.state.rglob("*"))
            if path.is_file()
        }

    def collect(self) -> list[tuple[str, bytes]]:
        """All that the agent sent so far."""
        self.received += self.aggregator.fence()
        return self.received

    def status(self, fits: Callable[[DeviceStatus], bool]) -> DeviceStatus:
        """The first status on the broker that fits."""

        def found() -> DeviceStatus | None:
            for topic, payload in self.collect():
                if topic.endswith("/status") and payload:
                    status = wire.unpack(payload, DeviceStatus)
                    if fits(status):
                        return status
            return None

        return until(found, "such a status")


def _of_fence(line: Line) -> bool:
    topic: str = line.get("topic", "")
    return topic.startswith(FENCE)
