"""Whole fleets under faults, one seed each: make a schedule, let it happen, and hold the outcome against the promises.

    python -m tests.sim.run --seeds 0..999 --jobs 4     run these schedules; the first that fails ends it with its seed
    python -m tests.sim.run --seeds 17 --trace          replay one and show what happened

Failure conditions (each a bug, whatever the faults were):

- a cell of a release's step is neither 0 nor one share: an update was counted twice, in part, or under another's name
- a device holds an `accepted` receipt for a round whose release has not its update
- a release contains an update of a device that has no accepted row, or the reverse
- two different signed records at one position, or a device that follows a release which the aggregator never signed
- a position that a device or the aggregator has accepted goes back
- the task does not come to its end within DAYS after the last fault: a round hangs
- a daemon raises anything, or holds more than its limits when all is quiet

Non-failure conditions (what the protocol does not promise):

- an update that was not accepted yet is lost with its device's round: the round closes without it, or is superseded
- a round whose key the aggregator lost, or which a new manifest or a rollback ends, is collected in vain
- a message comes any number of times, late, in any order between topics, or never while the sender is down
- a broker restarted empty or older shows nothing or old state until the aggregator has read it back
- devices train a round more than once when they crash before the update is in the outbox
- time: back-offs and extensions take as long as they are configured to

Same seed, same schedule: PYTHONHASHSEED is part of it and is set to 0 here.
"""

import argparse
import atexit
import contextlib
import itertools
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aggregator import ca
from shared import chunks, identity, signing, tensors, wire
from shared.messages import FedAvg, Graphs, Plan, Release, ReleaseMessage, Role, Signed, TaskManifest
from shared.topics import Topics
from tests.hostile import records
from tests.sim.nodes import Aggregator, Device, Program, clean, virtual
from tests.sim.world import EPOCH, Broker, Faults, World

TASK = "points"
WIDTH = 1000
"""Inputs of the model: 3,000 values, so that weights and updates need several chunks."""
CHUNK = 1024
"""Bytes of the publisher's chunks: as many as the broker's packets hold."""
DEVICES_MAX = 6
DAYS = 8
"""Virtual days after the last fault within which everything must have come to its end."""
PORTION = 10
"""Schedules that a process takes at a time, where there are many."""
Trace = Callable[[str], None]


class Broken(AssertionError):
    """A promise was broken."""


@dataclass
class Fleet:
    """Keys and bundles on disk, made once and read by every schedule."""

    folder: Path
    keys: records.Keys
    bundles: list[Path]

    @classmethod
    def make(cls, folder: Path) -> "Fleet":
        """A fleet of DEVICES_MAX devices."""
        fleet = folder / "fleet"
        ca.init_fleet(fleet, "sim", ["localhost"], now=EPOCH, passphrase=None)
        bundles = [folder / f"device-{number}" for number in range(DEVICES_MAX)]
        for bundle in bundles:
            ca.add_device(fleet, bundle.name, bundle, now=EPOCH, passphrase=None)
        keys = records.Keys(
            identity.load_signing_key(fleet / "publisher" / "publisher.key"),
            identity.load_signing_key(fleet / "aggregator" / "signing.key"),
            identity.load_signing_key(fleet / "root" / "root.key"),
        )
        return cls(fleet, keys, bundles)


@dataclass
class Schedule:
    """What a seed decides before anything happens."""

    world: World
    fleet: Fleet
    folder: Path
    trouble: float = 0.0
    """Virtual seconds of faults."""
    versions: dict[int, TaskManifest] = field(default_factory=dict)
    programs: list[Program] = field(default_factory=list)

    def run(self) -> Counter[str]:
        """All of it; Broken if a promise was. Returns what was seen."""
        dice = self.world.dice
        self.trouble = dice.choice((0.0, 300.0, 1_500.0, 6_000.0))
        faults = Faults(
            cut=dice.choice((0.0, 0.001, 0.004)),
            twice=dice.choice((0.0, 0.0, 0.2)),
            reorder=dice.random() < 0.3,
            delay=dice.choice((0.01, 0.05, 1.0)),
        )
        self.broker = Broker(self.world, faults)
        self.devices = [
            Device(self.world, self.broker, number, self.fleet.bundles[number], self.folder)
            for number in range(dice.randint(2, DEVICES_MAX))
        ]
        self.aggregator = Aggregator(self.world, self.broker, self.fleet.folder, self.folder)
        self.programs = [self.aggregator, *self.devices]
        for program in self.programs:
            self.world.at(dice.uniform(0.0, 20.0), program.start)
        self.world.at(dice.uniform(0.0, 30.0), lambda: self._publish(1))
        if dice.random() < 0.25:
            self.world.at(dice.uniform(60.0, max(61.0, self.trouble)), lambda: self._publish(2))
        if self.trouble:
            self._plan_faults()
        self.world.run(1000.0 + max(self.trouble, 100.0), lambda: False)
        self._calm()
        ended = self.world.run(self.world.now + DAYS * 86_400.0, self._finished)
        if not ended:
            raise Broken(f"not at its end {DAYS} days after the last fault: {self._where()}")
        self.world.run(self.world.now + 2 * 86_400.0, self._settled)
        return self._judge()

    # -- what happens --

    def _publish(self, version: int) -> None:
        dice, model = self.world.dice, records.wide(WIDTH)
        goal = dice.randint(1, len(self.devices))
        plan = Plan(
            goal=goal,
            min_updates=dice.randint(1, goal),
            rounds=dice.randint(1, 4),
            deadline=dice.choice((60, 300, 3600)),
            max_extension=3600,
            over_select=dice.choice((1.0, 1.3, 2.0)),
            start_jitter=dice.choice((0, 30)),
        )
        described = records.manifest(
            self.fleet.keys,
            TASK,
            version,
            model,
            expires=int(EPOCH) + 90 * 86_400,
            algorithm=FedAvg(weights="uniform"),
            plan=plan,
            **records.of_width(WIDTH),
        )
        self.versions[version] = described
        self.world.say(f"operator publishes version {version}: {plan}")
        keys = self.fleet.keys
        blob = chunks.describe(model.weights, CHUNK)
        signed = signing.sign(described, Role.PUBLISHER, keys.publisher)
        release = records.signed_release(signed, TASK, by=keys.publisher, model=model, v=2, weights=blob)
        graphs = Graphs(train=model.train, eval=model.eval)
        messages = [
            (
                "models/release",
                wire.pack(ReleaseMessage(v=1, manifest=signed, release=release, graphs=graphs, weights=model.weights)),
            )
        ]
        if dice.random() < 0.5:
            pieces = enumerate(chunks.pieces(model.weights, CHUNK))
            messages = [(Topics().chunk(blob.sha256.hex(), index), bytes(piece)) for index, piece in pieces]
            messages.append(
                ("models/release", wire.pack(ReleaseMessage(v=2, manifest=signed, release=release, graphs=graphs)))
            )
        self._insist(version, messages)

    def _insist(self, version: int, messages: list[tuple[str, bytes]]) -> None:
        """Publish as a person does, who looks whether the aggregator took it, and else does it again."""
        service = self.aggregator.service
        task = None if service is None else service._coordinator.tasks.get(TASK)
        if task is not None and task.manifest.version >= version:
            return
        if self.broker.up:
            for topic, payload in messages:
                self.broker.publish("_operator", 0, topic, payload, 1, retain=True)
        self.world.at(600.0, lambda: self._insist(version, messages))

    def _plan_faults(self) -> None:
        dice, world = self.world.dice, self.world
        rate = dice.choice((0.0, 1 / 1000.0, 1 / 200.0, 1 / 50.0))
        weights = [dice.choice((0.0, 1.0, 1.0, 3.0)) for _ in range(6)]
        if not rate or not any(weights):
            return
        at = 0.0
        while (at := at + dice.expovariate(rate)) < self.trouble:
            what = dice.choices(
                (
                    self._crash_device,
                    self._crash_aggregator,
                    self._stop_broker,
                    self._part,
                    self._sleep,
                    self._set_clock,
                ),
                weights,
            )[0]
            world.at(at, what)
        for _ in range(3):
            world.at(dice.uniform(0.0, self.trouble), self.broker.save)

    def _crash_device(self) -> None:
        self.world.dice.choice(self.devices).arm(self.world.dice.randint(1, 60))

    def _crash_aggregator(self) -> None:
        self.aggregator.arm(self.world.dice.randint(1, 120))

    def _stop_broker(self) -> None:
        if self.broker.up:
            self.broker.stop(self.world.dice.choice(("kept", "kept", "empty", "older")))
            self.world.at(self.world.dice.choice((1.0, 60.0, 1800.0)), self.broker.start)

    def _part(self) -> None:
        program = self.world.dice.choice(self.programs)
        if program.reachable:
            self._away(program, self.world.dice.choice((5.0, 200.0, 4000.0)))

    def _sleep(self) -> None:
        device = self.world.dice.choice(self.devices)
        if device.reachable:
            self._away(device, self.world.dice.choice((86_400.0, 20 * 86_400.0)))

    def _away(self, program: Program, seconds: float) -> None:
        self.world.say(f"{program.name} is away for {seconds:.0f} s")
        program.reachable = False
        if program.service is not None and program.service._link.connected:
            program.service._link.cut()

        def back() -> None:
            program.reachable = True

        self.world.at(seconds, back)

    def _set_clock(self) -> None:
        program = self.world.dice.choice(self.programs)
        program.skew = self.world.dice.choice((0.0, -900.0, 900.0))
        self.world.say(f"{program.name}: clock is off by {program.skew:.0f} s")
        program.wake()

    def _calm(self) -> None:
        """No fault from here on."""
        self.world.say("all is quiet from here on")
        self.broker.faults = Faults(delay=0.02)
        if not self.broker.up:
            self.broker.start()
        for program in self.programs:
            program.calm()
            program.reachable, program.skew = True, 0.0
            program.start()

    # -- what must come of it --

    def _finished(self) -> bool:
        service = self.aggregator.service
        if service is None or len(self.versions) == 0:
            return False
        task = service._coordinator.tasks.get(TASK)
        return task is not None and task.manifest.version == max(self.versions) and task.phase == "finished"

    def _settled(self) -> bool:
        """Every device has heard the end of its updates, and follows the newest release."""
        if self.aggregator.service is None:
            return False
        newest = signing.digest(self.aggregator.service._coordinator.tasks[TASK].release_signed)
        return all(device.service is not None and _quiet(device.service, newest) for device in self.devices)

    def _where(self) -> str:
        service = self.aggregator.service
        tasks = {} if service is None else {n: (t.phase, t.last_round) for n, t in service._coordinator.tasks.items()}
        return f"aggregator {'down' if service is None else tasks}, broker {'up' if self.broker.up else 'down'}"

    def _judge(self) -> Counter[str]:
        service = self.aggregator.service
        with sqlite3.connect(self.aggregator.config.database) as database:
            database.row_factory = sqlite3.Row
            releases = database.execute("SELECT * FROM releases ORDER BY manifest_version, number").fetchall()
            rounds = database.execute("SELECT * FROM rounds ORDER BY manifest_version, round").fetchall()
            rows = database.execute("SELECT * FROM contributions WHERE outcome = 'accepted'").fetchall()
        counted: dict[tuple[int, int], set[str]] = {}
        for row in rows:
            counted.setdefault((row["manifest_version"], row["collected_in"]), set()).add(row["device"])
        accepted = 0
        for version in sorted({each["manifest_version"] for each in releases}):
            layout = self.versions[version].layout
            chain = [each for each in releases if each["manifest_version"] == version]
            made = [each for each in rounds if each["manifest_version"] == version and each["state"] == "released"]
            steps = [each for each in chain[1:] if wire.unpack(_release(each).payload, Release).restores is None]
            if len(steps) != len(made):
                raise Broken(f"{len(steps)} releases of {len(made)} released rounds of version {version}")
            flat = {
                each["number"]: tensors.flatten(layout, tensors.load(self._weights(each["weights"]), layout))
                for each in chain
            }
            before = {later["number"]: earlier["number"] for earlier, later in itertools.pairwise(chain)}
            for release, round_ in zip(steps, made, strict=True):
                number = round_["round"]
                step = flat[release["number"]] - flat[before[release["number"]]]
                inside = {f"device-{cell}" for cell in np.flatnonzero(np.abs(step) > 1e-6)}
                expected = counted.get((version, number), set())
                if inside != expected:
                    raise Broken(f"round {number} of version {version} has {inside}, its rows say {expected}")
                shares = step[np.flatnonzero(np.abs(step) > 1e-6)]
                if not np.allclose(shares, 1.0 / len(expected), atol=1e-5):
                    raise Broken(f"round {number} of version {version}: shares {shares} of {len(expected)} updates")
                for device in self.devices:
                    told = [a for a in device.answers if a[:3] == (TASK, version, number) and a[3] == "accepted"]
                    accepted += len(told)
                    if told and device.name not in expected:
                        raise Broken(f"{device.name} holds a receipt for round {number}, which is not in the sum")
        self._judge_devices(releases)
        reassembler = service._coordinator.reassembler
        if reassembler.collecting or reassembler.waiting:
            raise Broken(f"{reassembler.collecting} updates are still collected when all is over")
        return Counter(
            schedules=1,
            releases=len(releases),
            rounds=len(rounds),
            accepted=accepted,
            crashes=sum(program.crashes for program in self.programs),
            **Counter(f"ended {each['state']}" for each in rounds),
        )

    def _weights(self, name: bytes) -> bytes:
        archived = self.world.archive.get(name)
        return archived if archived is not None else bytes(self.aggregator.service._blobs.get(name))

    def _judge_devices(self, releases: list[Any]) -> None:
        signed = {signing.digest(_release(each)): each for each in releases}
        newest = releases[-1]
        for device in self.devices:
            task = device.service._participation.tasks.get(TASK)
            if task is None or task.release_position is None:
                raise Broken(f"{device.name} follows nothing")
            held = signed.get(task.release_position.digest)
            if held is None:
                raise Broken(f"{device.name} holds a release that the aggregator never signed")
            if held["number"] != newest["number"] or held["manifest_version"] != newest["manifest_version"]:
                raise Broken(f"{device.name} has release {held['number']}, the newest is {newest['number']}")


def _quiet(service: Any, newest: bytes) -> bool:
    task = service._participation.tasks.get(TASK)
    position = None if task is None else task.release_position
    waiting = list(service._participation.delivery.waiting)
    return not waiting and position is not None and bool(position.digest == newest)


def _release(row: Any) -> Signed:
    return wire.unpack(row["signed"], Signed)


def run(seed: int, fleet: Fleet, trace: Trace | None = None) -> Counter[str]:
    """One schedule; raises what went wrong."""
    world = World(seed, trace)
    folder = Path(tempfile.mkdtemp(prefix=f"sim-{seed}-", dir=fleet.folder.parent))
    schedule = Schedule(world, fleet, folder)
    try:
        with virtual(world):
            return schedule.run()
    finally:
        for program in schedule.programs:
            if program.service is not None:
                program.release(program.service)
        clean(folder)


def checked(seed: int, fleet: Fleet, trace: Trace | None = None) -> Counter[str]:
    """One schedule; whatever goes wrong names its seed."""
    try:
        return run(seed, fleet, trace)
    except Exception as error:
        raise Broken(f"seed {seed} fails; replay: python -m tests.sim.run --seeds {seed} --trace") from error


@contextlib.contextmanager
def place() -> Iterator[Path]:
    """A folder for a fleet, in memory where that is possible: every write here is synchronised to the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder)


def many(seeds: Iterator[int], seconds: float | None, jobs: int) -> Counter[str]:
    """Schedules on several cores, all of `seeds` or for so many seconds; the first failure is raised."""
    end = None if seconds is None else time.monotonic() + seconds
    seen: Counter[str] = Counter()
    with ProcessPoolExecutor(jobs, initializer=_begin) as pool:
        waiting: set[Future[Counter[str]]] = set()
        while True:
            while len(waiting) < 2 * jobs and (end is None or time.monotonic() < end):
                portion = list(itertools.islice(seeds, PORTION))
                if not portion:
                    break
                waiting.add(pool.submit(_portion, portion))
            if not waiting:
                return seen
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            try:
                seen = sum((each.result() for each in done), seen)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


_site: Fleet | None = None
"""Of this process, where it is one of many."""


def _begin() -> None:
    global _site
    folder = contextlib.ExitStack()
    _site = Fleet.make(folder.enter_context(place()))
    atexit.register(folder.close)


def _portion(seeds: list[int]) -> Counter[str]:
    assert _site is not None
    return sum((checked(seed, _site) for seed in seeds), Counter())


def show(text: str) -> None:
    """A line on standard output."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    """See the module."""
    options = argparse.ArgumentParser(prog="python -m tests.sim.run", description=(__doc__ or "").splitlines()[0])
    options.add_argument("--seeds", default="0..99", help="N or FIRST..LAST (default 0..99)")
    options.add_argument("--trace", action="store_true", help="show what happens")
    options.add_argument("--seconds", type=float, help="go on after FIRST for so long, seed after seed")
    options.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    given = options.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":
        return subprocess.call(
            [sys.executable, "-m", "tests.sim.run", *sys.argv[1:]], env=os.environ | {"PYTHONHASHSEED": "0"}
        )
    first, _, last = given.seeds.partition("..")
    end = int(first) + 10**9 if given.seconds is not None else int(last or first) + 1
    seeds = iter(range(int(first), end))
    if given.trace:
        with place() as folder:
            fleet = Fleet.make(folder)
            seen = sum((checked(seed, fleet, show) for seed in seeds), Counter[str]())
    else:
        seen = many(seeds, given.seconds, given.jobs)
    show(", ".join(f"{name} {number}" for name, number in sorted(seen.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
