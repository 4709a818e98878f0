"""Many devices in one round: what the aggregator takes in a second, and how its memory grows with their number.

The devices have no agent and do not train: this process holds a connection with each one's own certificate and sends
its sealed and signed update over the real broker. All updates are made before the first is sent.
"""

import time
from pathlib import Path
from typing import TypeVar

from bench import meters
from bench.fleet import Fleet
from bench.kernels import TOPICS, Device, some_delta
from bench.report import Figure, Goal
from shared import wire
from shared.driver import Mailbox
from shared.messages import RoundOffer, Signed
from shared.mqtt import Link, LinkEvent, LinkSettings, LinkUp, Message
from shared.topics import TASK_ROUNDS

E = TypeVar("E")


def measure(root: Path, devices: int) -> list[Figure]:
    """The figures of one round with one 4 MB update from each of `devices`."""
    with Fleet(root, devices, 1) as fleet:
        everyone = [(Device(bundle), bundle) for bundle in map(fleet.bundle, range(devices))]
        release = fleet.build()
        fleet.start()
        assert fleet.aggregator is not None
        server, log = fleet.aggregator.pid, fleet.log()
        fleet.until("the aggregator is connected", lambda: any(e["event"] == "link.up" for e in log.read()), 30)
        links = [_connect(fleet.port, device, bundle) for device, bundle in everyone]
        fleet.publish(release)
        offer = _offer(links[0])
        delta = some_delta(0)
        updates = [device.update(offer, delta) for device, _ in everyone]
        cpu, before, began = meters.cpu_seconds(server), meters.resident(server), time.monotonic()
        for (link, _), (topic, message) in zip(links, updates, strict=True):
            link.publish(topic, message)
        fleet.until("the round is closed", lambda: any(e["event"] == "round.closed" for e in log.read()), 120)
        accepted = [each["at"] for each in log.read() if each["event"] == "update.accepted"]
        wall, spent = time.monotonic() - began, meters.cpu_seconds(server) - cpu
        peak, after = meters.resident_peak(server), meters.resident(server)
        for link, mailbox in links:
            mailbox.close()
            link.stop()
    group = f"Ingest, {devices} devices in one round"
    return [
        Figure(group, "updates a second, durable, to the round's end", "/s", (devices / wall,)),
        Figure(
            group, "updates a second, first to last accepted", "/s", ((devices - 1) / (accepted[-1] - accepted[0]),)
        ),
        Figure(group, "updates of a CPU-second of the aggregator", "", (devices / spent,), Goal(">=", 200)),
        Figure(group, "resident before: aggregator", "MB", (before,)),
        Figure(group, "resident, peak: aggregator", "MB", (peak,), Goal("<=", 108)),
        Figure(group, "resident after: aggregator", "MB", (after,)),
    ]


def _connect(port: int, device: Device, bundle: Path) -> tuple[Link, Mailbox[LinkEvent]]:
    mailbox: Mailbox[LinkEvent] = Mailbox(1000, 1 << 30)
    settings = LinkSettings(
        host="127.0.0.1",
        port=port,
        client_id=device.name,
        ca=bundle / "ca.crt",
        cert=bundle / "device.crt",
        key=bundle / "device.key",
    )
    link = Link(settings, mailbox)
    link.start()
    _first(mailbox, LinkUp)
    link.subscribe(TASK_ROUNDS)
    link.publish(TOPICS.device_status(device.name), device.status(), retain=True)
    return link, mailbox


def _offer(connection: tuple[Link, Mailbox[LinkEvent]]) -> RoundOffer:
    message = _first(connection[1], Message)
    return wire.unpack(wire.unpack(message.payload, Signed).payload, RoundOffer)


def _first(mailbox: Mailbox[LinkEvent], kind: type[E]) -> E:
    end = time.monotonic() + 60
    while (left := end - time.monotonic()) > 0:
        for event in mailbox.take(left):
            if isinstance(event, kind):
                return event
    raise TimeoutError(f"no {kind.__name__} came within a minute")
