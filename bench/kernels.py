"""What single steps cost, in this process and without a network: the fold, each step of an update, the disk.

CPU time is this process's, all threads. "Ours" is the product's own function, never a copy of it.
"""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding

from aggregator import ca, config, validate
from aggregator.fold import Fold
from aggregator.service import Service
from aggregator.store import Store
from bench.fleet import PARAMETERS, TASK, Fleet
from bench.report import Figure, Goal
from shared import identity, logs, sealing, tensors, wire
from shared.driver import Driver, read_clock
from shared.messages import (
    DeviceStatus,
    PlainBody,
    ReleaseMessage,
    RoundOffer,
    TaskManifest,
    UpdateContext,
    UpdateHead,
    UpdateMessage,
)
from shared.mqtt import LinkUp, Message
from shared.opset import OPSET_VERSION
from shared.signing import digest
from shared.topics import RELEASE, Topics

SIZE = 4 * PARAMETERS
CLIP = 10.0
TOPICS = Topics()


def measure(root: Path, devices: int = 30) -> list[Figure]:
    """The figures; `root` is on the disk whose rate is measured, `devices` send one update each."""
    return [*_disk(root), *_fold(), *_steps(root), *_path(root / "path", devices)]


class Device:
    """A device without an agent: its certificate, its key and an update that is nobody's training."""

    def __init__(self, bundle: Path) -> None:
        self.name = bundle.name
        self.key = identity.load_key(bundle / "device.key")
        self.certificate = identity.load_certificate(bundle / "device.crt").public_bytes(Encoding.DER)

    def status(self) -> bytes:
        """Ready to train the benchmark's task."""
        return wire.pack(
            DeviceStatus(
                v=1,
                session=bytes(8),
                online=True,
                version="bench",
                opsets=[OPSET_VERSION],
                eligible=True,
                obstacles=[],
                datasets=[TASK],
                sent=int(time.time()),
            )
        )

    def update(self, offer: RoundOffer, delta: memoryview) -> tuple[str, bytes]:
        """(topic, message) of a sealed and signed update for an open offer, made as trainer and agent make it."""
        context = wire.pack(
            UpdateContext(
                v=1,
                task=offer.task,
                manifest=offer.manifest,
                release=offer.release,
                round=offer.round,
                device=self.name,
                report=os.urandom(16),
                mode="plain",
                k_min=0,
                codec="fp32",
                dimension=PARAMETERS,
            )
        )
        header = PlainBody(examples=16, steps=1, metrics={"loss": 1.0}, holdout=4)
        encapsulation, body = sealing.seal(header, delta, offer.hpke_key, context)
        head = wire.pack(
            UpdateHead(
                v=1,
                context=context,
                encapsulation=encapsulation,
                size=len(body),
                sha256=hashlib.sha256(body).digest(),
                chunk_size=0,
                certificate=self.certificate,
                shares=[],
            )
        )
        message = wire.pack(UpdateMessage(v=1, head=head, sig=identity.sign_head(self.key, head), body=bytes(body)))
        return TOPICS.head(0, self.name, hashlib.sha256(head).hexdigest()[:32]), message


def some_delta(seed: int) -> memoryview:
    """A delta of norm about 1, as the codec encodes it."""
    return memoryview((np.random.default_rng(seed).standard_normal(PARAMETERS, np.float32) / 1000).tobytes())


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
    delta = some_delta(0)
    _, message = device.update(offer, delta)
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
        service.mailbox.post(Message(RELEASE, release, False, 1, 0, 0))
        for device in everyone:
            service.mailbox.post(Message(TOPICS.device_status(device.name), device.status(), True, 1, 0, 0))
        driver.turn(0)
        store = Store(settings.database, read_only=True)
        (task,) = store.tasks()
        store.close()
        assert task.round is not None
        offer = wire.unpack(task.round.offer.payload, RoundOffer)
        delta = some_delta(0)
        wall, cpu = [], []
        for device in everyone:
            message = Message(*device.update(offer, delta), False, 1, 0, 0)
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
