"""A release's way to many devices: seconds until each has it whole, bytes on the wire, and what the broker spends.

The devices have no agent: one process holds a connection with each one's own certificate and fetches the weights as an
agent does, by the product's own Fetch and Spool. Its CPU competes with the broker's, so the seconds are an upper bound.
"""

import json
import queue
import subprocess
import sys
import time
from pathlib import Path

from bench import meters
from bench.fleet import TASK, Fleet
from bench.report import Figure
from shared import wire
from shared.fetch import Fetch, Progress
from shared.messages import Release, ReleaseMessage
from shared.mqtt import Link, LinkEvent, LinkSettings, LinkUp, Message
from shared.spool import Spool
from shared.topics import Topics, task_release

TOPICS = Topics()


def measure(root: Path, devices: int) -> list[Figure]:
    """The figures of one release of 4 MB for `devices` devices."""
    with Fleet(root, devices, 1) as fleet:
        bundles = [fleet.bundle(number) for number in range(devices)]
        release = fleet.build()
        fleet.start()
        log = fleet.log()
        fleet.until("the aggregator is connected", lambda: any(e["event"] == "link.up" for e in log.read()), 30)
        asked = [sys.executable, "-m", "bench.distribution", str(fleet.port), *map(str, bundles)]
        with subprocess.Popen(asked, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as clients:
            assert clients.stdin is not None and clients.stdout is not None
            assert clients.stdout.readline() == "ready\n"
            broker = fleet.broker.pid
            assert broker is not None
            spent, client = meters.cpu_seconds(broker), meters.cpu_seconds(clients.pid)
            fleet.publish(release)
            found = json.loads(clients.stdout.readline())
            spent, client = meters.cpu_seconds(broker) - spent, meters.cpu_seconds(clients.pid) - client
            clients.stdin.close()
        began = next(each["at"] for each in log.read() if each["event"] == "task.adopted")
    size = found["size"]
    seconds = tuple(at - began for at in found["at"])
    group = f"A release of {size / 1e6:.1f} MB to {devices} devices"
    return [
        Figure(group, "seconds until a device has it whole", "s", seconds),
        Figure(group, "seconds until the last has it", "s", (max(seconds),)),
        Figure(group, "bytes received, of its size", "", tuple(each / size for each in found["bytes"])),
        Figure(group, "MB a second, all devices together", "MB/s", (size * devices / max(seconds) / 1e6,)),
        Figure(group, "CPU: broker", "s", (spent,)),
        Figure(group, "CPU: the process that is all devices", "s", (client,)),
    ]


class _Device:
    """One connection and what it has of the release."""

    def __init__(self, port: int, bundle: Path, heard: "queue.SimpleQueue[tuple[_Device, LinkEvent]]") -> None:
        self._heard, self._bundle = heard, bundle
        self.at: float | None = None
        self.size = 0
        self._fetch: Fetch | None = None
        self._spool: Spool | None = None
        self.link = Link(
            LinkSettings(
                host="127.0.0.1",
                port=port,
                client_id=bundle.name,
                ca=bundle / "ca.crt",
                cert=bundle / "device.crt",
                key=bundle / "device.key",
            ),
            self,
        )

    def post(self, event: LinkEvent) -> None:
        """From the link's thread."""
        self._heard.put((self, event))

    def post_payload(self, event: LinkEvent, size: int) -> None:
        """Likewise: at most a window of chunks is on its way to each."""
        self.post(event)

    def take(self, event: LinkEvent) -> None:
        """What an agent does with it."""
        if isinstance(event, LinkUp):
            self.link.subscribe(task_release(TASK))
        elif isinstance(event, Message) and event.topic == task_release(TASK):
            self._release(wire.unpack(event.payload, ReleaseMessage))
        elif isinstance(event, Message) and self._fetch is not None and self._spool is not None:
            _, index = TOPICS.parse_chunk(event.topic)
            step = self._fetch.arrived(index, event.payload, time.monotonic())
            if step.write:
                self._spool.write(index, event.payload)
            if step.unsubscribe:
                self.link.unsubscribe(*self._topics(step.unsubscribe))
            if step.subscribe:
                self.link.subscribe(*self._topics(step.subscribe))
            if step.progress is Progress.DONE:
                self._spool.finish(self._bundle / "weights")
                self.at = time.time()

    def _release(self, message: ReleaseMessage) -> None:
        blob = wire.unpack(message.release.payload, Release).weights
        self.size = blob.size
        if message.weights is not None:
            (self._bundle / "weights").write_bytes(message.weights)
            self.at = time.time()
            return
        self._spool = Spool(self._bundle / "spool", blob)
        self._fetch = Fetch(blob, self._spool.missing(), time.monotonic())
        self.link.subscribe(*self._topics(self._fetch.connected(time.monotonic())))

    def _topics(self, numbers: tuple[int, ...]) -> list[str]:
        assert self._fetch is not None
        return [TOPICS.chunk(self._fetch.blob.sha256.hex(), index) for index in numbers]


def main() -> None:
    """All devices of one measurement: port and bundles on the command line, a line of JSON at the end."""
    heard: queue.SimpleQueue[tuple[_Device, LinkEvent]] = queue.SimpleQueue()
    devices = [_Device(int(sys.argv[1]), Path(bundle), heard) for bundle in sys.argv[2:]]
    for device in devices:
        device.link.start()
    connected = 0
    while connected < len(devices):
        device, event = heard.get(timeout=60)
        connected += isinstance(event, LinkUp)
        device.take(event)
    print("ready", flush=True)
    while any(device.at is None for device in devices):
        device, event = heard.get(timeout=120)
        device.take(event)
    moved = [device.link.bytes_moved()[0] for device in devices]
    print(json.dumps({"size": devices[0].size, "at": [d.at for d in devices], "bytes": moved}), flush=True)
    sys.stdin.read()
    for device in devices:
        device.link.stop()


if __name__ == "__main__":
    main()
