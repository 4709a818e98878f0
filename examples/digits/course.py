"""The demo's course from an empty folder to a report: set the fleet up, watch it learn, judge every release, sum up.

It holds no model and no rule of the product: it starts the parts, and asks and hears them as an operator would.
"""

import contextlib
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from aggregator import release as release_file
from aggregator.broker import Broker
from edge_agent.child import rss
from examples.digits import data, place
from examples.digits.judge import Judge, Score
from examples.digits.place import Place
from examples.digits.processes import DemoError, Process, Processes, end_of, program
from examples.digits.report import DeviceRecord, Report, RoundRecord
from examples.digits.screen import Screen, open_screen
from examples.digits.watch import Ear, ask
from shared import identity, trust, wire
from shared.messages import OfferState, Signed
from shared.mqtt import Message

TASK = "digits"
STALL = 180.0
"""Seconds without a new release after which the demo gives up."""

LOOK = 0.5
"""Seconds between two looks at the devices."""

BACK = 1.0
"""Seconds for which a device that was killed stays away."""

DEVICE_MEMORY = 260 << 20
"""Bytes that a device's agent and its trainer take together, besides what all trainers share."""

OWN_MEMORY = 450 << 20
"""Bytes that the demo itself, the broker and the aggregator take."""


def run(folder: Path, devices: int, rounds: int) -> Report:
    """A demo in `folder`, which it empties; its processes have ended when this returns or raises (FieldfareError)."""
    root = folder.resolve()
    with place.claim(root), open_screen(rounds) as screen:
        return Demo(Place(root), devices, rounds, screen).run()


class Demo:
    """One run from an empty folder to a report."""

    def __init__(self, here: Place, devices: int, rounds: int, screen: Screen) -> None:
        self._place, self._rounds, self._screen = here, rounds, screen
        self._devices = [
            DeviceRecord(name=f"device-{number}", digits=data.digits_of(number, devices)) for number in range(devices)
        ]
        self._begun = time.monotonic()
        self._killed: tuple[int, float] | None = None
        """(number of the device, monotonic second) of the one that is away."""

    def run(self) -> Report:
        """All of it; the processes have ended when this returns or raises."""
        port = self._make()
        with Processes(Broker(self._place.fleet / "broker", port)) as processes:
            self._start(processes)
            judge = self._build()
            processes.check()
            self._screen.stage("publishing it to models/release")
            place.publish_release(self._place)
            published = time.monotonic()
            training = self._train(processes, judge, published)
            trained = time.monotonic()
            memory = processes.aggregator and rss(processes.aggregator.pid)
            self._screen.stage("taking the model home as safetensors")
            place.export_model(self._place)
        self._screen.stage("training every device once more, with its own data only")
        for number, device in enumerate(self._devices):
            alone = judge.alone(number, len(training.records))
            device.alone_accuracy, device.alone_known = round(alone.accuracy, 4), alone.known
        report = Report(
            rounds_planned=self._rounds,
            epochs=judge.manifest.training.epochs,
            images=judge.images,
            digits=judge.digits,
            start_accuracy=judge.start.accuracy,
            rounds=training.records,
            devices=self._devices,
            digits_known=training.score.known,
            accuracy_by_digit=training.score.by_digit,
            aggregator_memory=memory or 0,
            setup_seconds=published - self._begun,
            training_seconds=trained - published,
            total_seconds=time.monotonic() - self._begun,
            places={
                "model": str(self._place.model),
                "report": str(self._place.report),
                "logs": str(self._place.logs),
                "fleet": str(self._place.fleet),
                "devices": str(self._place.root / "devices"),
            },
        )
        report.write(self._place.report)
        self._screen.stage("done")
        return report

    def _make(self) -> int:
        """The fleet, the devices and what they hold; returns the broker's port."""
        need, free = OWN_MEMORY + len(self._devices) * DEVICE_MEMORY, _memory_available()
        if free is not None and free < need:
            few = max(1, (free - OWN_MEMORY) // DEVICE_MEMORY)
            raise DemoError(f"{need >> 20} MiB of memory are needed and {free >> 20} are available; try DEVICES={few}")
        self._screen.stage(f"making a fleet with {len(self._devices)} devices in {self._place.root}")
        port = place.make_fleet(self._place)
        place.make_machine(self._place)
        place.make_task(self._place, len(self._devices), self._rounds)
        pixels, labels = data.load()
        for device, rows in zip(self._devices, data.deal(labels, len(self._devices)), strict=True):
            place.make_device(self._place, device.name)
            data.write(self._place.data(device.name), pixels[rows], labels[rows])
        return port

    def _start(self, processes: Processes) -> None:
        """Broker, aggregator and agents."""
        self._screen.stage("starting mosquitto, the aggregator and the agents")
        processes.broker.start()
        config = self._place.fleet / "aggregator" / "aggregator.toml"
        log = self._place.logs / "aggregator.log"
        processes.aggregator = Process("aggregator", log, [program("aggregator"), "run", "--config", str(config)])
        for name in (device.name for device in self._devices):
            config, log = self._place.device(name) / "agent.toml", self._place.logs / f"{name}.log"
            processes.agents.append(Process(name, log, [program("edge-agent"), "run", "--config", str(config)]))
        self._screen.devices(self._devices)

    def _build(self) -> Judge:
        """Build the release file, and what judges its weights and all that follow."""
        self._screen.stage("building the release: the model becomes data, signed by the publisher")
        place.build_release(self._place)
        root = identity.load_root(self._place.fleet / "root" / "root.msgpack")
        found = release_file.read(self._place.release.read_bytes(), root, time.time())
        judge = Judge(found, root, [self._place.data(device.name) for device in self._devices])
        for device, (fit, held) in zip(self._devices, judge.splits, strict=True):
            device.examples, device.held_out = len(fit), len(held)
        return judge

    def _train(self, processes: Processes, judge: Judge, published: float) -> "Training":
        """Until the task is finished: judge every release, look at every device."""
        self._screen.stage(f"training for {self._rounds} rounds; the trainers start first, which can take 10 s")
        training = Training(published, judge.start)
        looked, heard = 0.0, published
        with Ear(place.operator(self._place), TASK) as ear:
            while not training.finished:
                for at, message in ear.listen(LOOK):
                    if message.topic == ear.offer:
                        self._hear_offer(training, judge, message, at)
                        self._strike(processes, training)
                    elif (record := self._hear_release(training, judge, message, at)) is not None:
                        heard = time.monotonic()
                        self._screen.devices(self._devices)
                        self._screen.released(record)
                self._revive(processes)
                processes.check()
                if time.monotonic() - looked >= LOOK:
                    self._look()
                    self._screen.devices(self._devices)
                    looked = time.monotonic()
                if time.monotonic() - heard > STALL:
                    raise DemoError(f"no new release for {STALL:.0f} seconds; {self._aggregators_words()}")
        self._look()
        self._revive(processes)
        self._screen.devices(self._devices)
        if self._killed is not None:
            raise DemoError(f"{self._devices[self._killed[0]].name} was killed and did not come back")
        if not training.records:
            raise DemoError(f"the task ended without a new release; {self._aggregators_words()}")
        return training

    def _hear_offer(self, training: "Training", judge: Judge, message: Message, at: float) -> None:
        offer = trust.offer(wire.unpack(message.payload, Signed), judge.first.message.manifest, judge.manifest)
        training.opened.setdefault(offer.round, at)
        training.finished = offer.state is OfferState.FINISHED

    def _hear_release(self, training: "Training", judge: Judge, message: Message, at: float) -> RoundRecord | None:
        found = release_file.read(message.payload, judge.root, time.time())
        if found.release.number <= training.newest or found.message.weights is None:
            return None
        training.score = judge.score(found.message.weights)
        self._look()
        up, down = (sum(d.bytes_up for d in self._devices), sum(d.bytes_down for d in self._devices))
        number = max(training.opened, default=found.release.number)
        record = RoundRecord(
            round=number,
            release=found.release.number,
            accuracy=training.score.accuracy,
            loss=training.score.loss,
            reported_accuracy=found.release.metrics.get("accuracy"),
            seconds=at - training.opened.get(number, training.published),
            at=at - training.published,
            bytes_up=up - training.up,
            bytes_down=down - training.down,
        )
        training.up, training.down = up, down
        training.records.append(record)
        return record

    def _strike(self, processes: Processes, training: "Training") -> None:
        """Kill one device in the middle of the round that is half-way; its update is still to come or on its way."""
        number, half = max(training.opened), 1 + self._rounds // 2
        device = self._devices[-1]
        if number != half or number == 1 or device.killed_in is not None or len(self._devices) == 1:
            return
        ask(self._place, device)
        processes.agents[-1].kill()
        device.killed_in, device.state = number, "killed"
        device.before = (device.updates, device.bytes_up, device.bytes_down)
        self._killed = (len(self._devices) - 1, time.monotonic())
        self._screen.stage(f"{device.name} was killed in the middle of round {number} (kill -9); the round goes on")

    def _revive(self, processes: Processes) -> None:
        """Start a killed device again, and see it come back."""
        if self._killed is None:
            return
        number, at = self._killed
        device, process = self._devices[number], processes.agents[number]
        if device.state == "killed" and time.monotonic() - at >= BACK:
            processes.agents[number] = process.again()
            device.state = "starting"
        elif device.state not in ("killed", "starting", "not connected"):
            device.back_after = round(time.monotonic() - at, 2)
            self._killed = None
            self._screen.stage(f"{device.name} is back after {device.back_after:.1f} s; nothing was lost")

    def _look(self) -> None:
        for device in self._devices:
            ask(self._place, device)

    def _aggregators_words(self) -> str:
        return end_of(self._place.logs / "aggregator.log")


@dataclass(slots=True)
class Training:
    """What is known of it so far; times are monotonic seconds."""

    published: float
    score: Score
    """Of the newest release."""
    records: list[RoundRecord] = field(default_factory=list)
    opened: dict[int, float] = field(default_factory=dict)
    """When each round's first offer came."""
    up: int = 0
    down: int = 0
    """Bytes of all devices up to the newest release."""
    finished: bool = False

    @property
    def newest(self) -> int:
        """The number of the newest release."""
        return self.records[-1].release if self.records else 0


def _memory_available() -> int | None:
    """Bytes; of this machine, not of the one that the agents see."""
    with contextlib.suppress(OSError):
        found = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None
