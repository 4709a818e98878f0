"""What single steps cost, in this process and without a network: the fold, each step of an update, the disk.

CPU time is this process's, all threads. "Ours" is the product's own function, never a copy of it.
"""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from aggregator import ca, config, validate
from aggregator.fold import Fold
from aggregator.service import Service
from aggregator.store import Store
from bench.device import CLIP, TOPICS, Device, some_delta
from bench.fleet import MILLION, TASK, Fleet
from bench.report import Figure, Goal
from shared import identity, logs, sealing, tensors, wire
from shared.driver import Driver, read_clock
from shared.messages import (
    ReleaseMessage,
    RoundOffer,
    TaskManifest,
    UpdateHead,
    UpdateMessage,
)
from shared.mqtt import LinkUp, Message
from shared.signing import digest
from shared.topics import RELEASE

PARAMETERS = MILLION.parameters
SIZE = 4 * PARAMETERS


def measure(root: Path, devices: int = 30) -> list[Figure]:
    """The figures; `root` is on the disk whose rate is measured, `devices` send one update each."""
    return [*_disk(root), *_fold(), *_steps(root), *_path(root / "path", devices)]


def disk_rate(root: Path, size: int, count: int) -> float:
    """Files of `size` bytes that the disk takes in a second, each with one fdatasync."""
    data, paths = os.urandom(size), [root / f"rate-{number}" for number in range(count)]
    began = time.perf_counter()
    for path in paths:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.write(file, data)
        os.fdatasync(file)
        os.close(file)
    seconds = time.perf_counter() - began
    for path in paths:
        path.unlink()
    return count / seconds


def _disk(root: Path) -> list[Figure]:
    group = "The disk alone (one file and fdatasync each)"
    large = tuple(disk_rate(root, SIZE, 10) for _ in range(5))
    small = tuple(disk_rate(root, 512, 20) for _ in range(5))
    return [Figure(group, "files of 4 MB a second", "/s", large), Figure(group, "files of 512 B a second", "/s", small)]


def _fold() -> list[Figure]:
    random = np.random.default_rng(0)
    deltas = [random.standard_normal(PARAMETERS, np.float32) for _ in range(16)]
    total = np.zeros(PARAMETERS, np.float32)

    def ours() -> None:
        fold = Fold(PARAMETERS)
        for number, delta in enumerate(deltas):
            fold.add(b"", delta, 1.0 + number)

    def plain() -> None:
        for delta in deltas:
            np.add(total, delta, out=total)

    gigabytes = len(deltas) * SIZE / 1e9
    rates = [tuple(1000 * gigabytes / spent for spent in _milliseconds(each, 15)) for each in (ours, plain)]
    return [
        Figure("Fold", "streaming fp32, of a CPU-second", "GB", rates[0], Goal(">=", 10)),
        Figure("Fold", "limit of this machine: one numpy add, no weight", "GB", rates[1]),
    ]


def _steps(root: Path) -> list[Figure]:
    """Each step that touches the 4 MB of an update or release, alone."""
    fleet = root / "steps"
    ca.init_fleet(fleet, TASK, ["127.0.0.1"], now=time.time(), passphrase=None)
    device = Device(ca.add_device(fleet, "dev-0", root / "dev-0", now=time.time(), passphrase=None))
    authority = identity.load_certificates(fleet / "ca" / "ca.crt")
    private, public = sealing.generate()
    offer = RoundOffer(1, TASK, bytes(32), bytes(32), 1, 0, "open", 2**32, CLIP, 1, "x25519", public, 0)  # type: ignore[arg-type]
    delta = some_delta(PARAMETERS)
    message = device.update(offer, delta).message
    update = wire.unpack(message, UpdateMessage)
    head = wire.unpack(update.head, UpdateHead)
    body = update.body
    assert body is not None
    header, data = sealing.open_sealed(private, head.encapsulation, body, head.context)
    verified = identity.verify_device(device.certificate, authority, time.time())
    steps: dict[str, Callable[[], object]] = {
        "device: seal": lambda: sealing.seal(header, delta, public, head.context),
        "device: head signature (ECDSA P-256)": lambda: identity.sign_head(device.key, update.head),
        "both: wire.pack of the update": lambda: wire.pack(update),
        "both: wire.unpack of the update": lambda: wire.unpack(message, UpdateMessage),
        "both: sha256 of the body": lambda: hashlib.sha256(body).digest(),
        "aggregator: certificate chain": lambda: identity.verify_device(device.certificate, authority, time.time()),
        "aggregator: head signature": lambda: identity.verify_head(verified.public_key, update.head, update.sig),
        "aggregator: open": lambda: sealing.open_sealed(private, head.encapsulation, body, head.context),
        "aggregator: decode, finite, norm": lambda: validate.delta("fp32", data, [PARAMETERS], CLIP),
    }
    return [Figure("Steps of one 4 MB update, CPU", name, "ms", _milliseconds(step)) for name, step in steps.items()]


def _milliseconds(step: Callable[[], object], times: int = 15) -> tuple[float, ...]:
    step()
    found = []
    for _ in range(times):
        spent = time.process_time()
        step()
        found.append((time.process_time() - spent) * 1000)
    return tuple(found)


def _path(root: Path, devices: int) -> list[Figure]:
    """The aggregator's own driver and service, fed with messages: decode, verify, open, store, fold, close, publish.

    Its link is never started, so what it publishes waits in memory: the network is left out, the disk is not.
    """
    fleet = Fleet(root, devices, 1)
    everyone = [Device(fleet.bundle(number)) for number in range(devices)]
    release = fleet.build().read_bytes()
    folder = fleet.folder / "aggregator"
    settings = config.load(folder / "aggregator.toml")
    with (root / "aggregator.log").open("w") as log:
        logs.configure("info", "json", environ={}, identifier="bench", stream=log)
        service = Service(settings, read_clock())
        driver = Driver(service.mailbox, service, service)
        service.mailbox.post(LinkUp(False, None))
        # Our own word comes back after all that the broker retains: nothing.
        own = service._presence(online=True)
        service.mailbox.post(Message(TOPICS.aggregator_status(0), own, False, 1, 0, 0))
        service.mailbox.post(Message(RELEASE, release, False, 1, 0, 0))
        for device in everyone:
            service.mailbox.post(Message(TOPICS.device_status(device.name), device.status(), True, 1, 0, 0))
        driver.turn(0)
        store = Store(settings.database, read_only=True)
        (task,) = store.tasks()
        store.close()
        assert task.round is not None
        offer = wire.unpack(task.round.offer.payload, RoundOffer)
        delta = some_delta(PARAMETERS)
        wall, cpu = [], []
        for device in everyone:
            made = device.update(offer, delta)
            message = Message(made.topic, made.message, False, 1, 0, 0)
            service.mailbox.post(message)
            began, spent = time.perf_counter(), time.process_time()
            driver.turn(0)
            wall.append(time.perf_counter() - began)
            cpu.append(time.process_time() - spent)
        text = (root / "aggregator.log").read_text()
    if text.count('"update.accepted"') != devices or '"round.closed"' not in text:
        raise RuntimeError(f"the updates were not all accepted; see {root / 'aggregator.log'}")
    group = "One 4 MB update through the aggregator, no network"
    manifest = wire.unpack(task.manifest.payload, TaskManifest)
    published = wire.unpack(release, ReleaseMessage)
    assert digest(published.manifest) == offer.manifest and tensors.load(published.weights or b"", manifest.layout)
    # The last one also closes the round: another quantity.
    return [
        Figure(group, "wall, durable", "ms", tuple(1000 * each for each in wall[:-1])),
        Figure(group, "CPU", "ms", tuple(1000 * each for each in cpu[:-1])),
        Figure(group, "updates of a CPU-second", "", tuple(1 / each for each in cpu[:-1])),
        Figure(group, "closing: reduce, store, publish; wall", "ms", (1000 * wall[-1],)),
        Figure(group, "closing: reduce, store, publish; CPU", "ms", (1000 * cpu[-1],)),
    ]
