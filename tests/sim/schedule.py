"""One schedule: what a seed decides to happen to a fleet, until all is quiet. What must come of it: tests.sim.judge."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from msgspec import UNSET

from aggregator import ca
from shared import chunks, identity, signing, wire
from shared.messages import FedAvg, Gate, Graphs, Plan, ReleaseMessage, Role
from shared.topics import Topics
from tests.hostile import records
from tests.sim import judge
from tests.sim.judge import DAYS, Broken, Ledger
from tests.sim.nodes import Aggregator, Device, Program, clean, virtual
from tests.sim.world import EPOCH, Broker, Faults, World

WIDTH = 700
"""Inputs of the models: 2,100 values, so that weights and updates need several chunks."""
CHUNK = 2048
"""Bytes of the publisher's chunks."""
DEVICES_MAX = 6
DAY = 86_400.0
YEAR = 365 * DAY
MODEL = records.wide(WIDTH)
Trace = Callable[[str], None]


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
    """See the module. `folder` is its own."""

    world: World
    fleet: Fleet
    folder: Path
    trouble: float = 0.0
    """Virtual seconds of faults."""
    versions: dict[str, int] = field(default_factory=dict)
    """The newest version that was published of each task."""
    programs: list[Program] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)

    def run(self) -> Counter[str]:
        """All of it; Broken if a promise was. Returns what was seen."""
        dice = self.world.dice
        self.trouble = dice.choice((0.0, 300.0, 300.0, 1_500.0, 1_500.0, 6_000.0))
        large = dice.random() < 0.2
        inline = 64 << 10 if large else 64
        self.broker = Broker(
            self.world,
            Faults(
                cut=dice.choice((0.0, 0.001, 0.004)),
                twice=dice.choice((0.0, 0.0, 0.2)),
                lost=dice.choice((0.0, 0.0, 0.05)),
                reorder=dice.random() < 0.3,
                delay=dice.choice((0.01, 0.05, 1.0)),
            ),
            packet_max=256 << 10 if large else 4096,
            queue_max=dice.choice((1000, 1000, 1000, 40)),
        )
        self.ledger = Ledger(self.world)
        self.ledger.broker_forgot = self.broker.faults.reorder
        self.devices = [
            Device(self.world, self.broker, self.ledger, number, self.fleet.bundles[number], self.folder, inline)
            for number in range(dice.choice((2, 3, 3, 4, 5, DEVICES_MAX)))
        ]
        self.aggregator = Aggregator(self.world, self.broker, self.ledger, self.fleet.folder, self.folder, inline)
        self.programs = [self.aggregator, *self.devices]
        for program in self.programs:
            self.world.at(dice.uniform(0.0, 20.0), program.start)
        for task in ("points", "lines") if dice.random() < 0.1 else ("points",):
            self.versions[task] = 0
            self._later(30.0, lambda task=task: self._publish(task))  # type: ignore[misc]
            if dice.random() < 0.25:
                self._later(max(60.0, self.trouble), lambda task=task: self._publish(task), 60.0)  # type: ignore[misc]
        if self.trouble:
            self._plan_faults()
        self.world.run(1000.0 + max(self.trouble, 100.0), lambda: False)
        return self._end()

    def _later(self, most: float, act: Callable[[], None], least: float = 0.0) -> None:
        self.world.at(self.world.dice.uniform(least, most), act)

    def _end(self) -> Counter[str]:
        """Let everything come to rest, and judge it; the same once more after everybody was restarted."""
        self._calm()
        last = max([self.world.now, *(program.off_until for program in self.programs)])
        if self.ledger.forgot:
            self._help(last + DAYS * DAY)
            last = self.world.now
        self._rest(last + DAYS * DAY)
        seen = judge.judge(self.ledger, self.aggregator, self.devices)
        if self.world.chance(0.2):
            for program in self.programs:
                program.sleep(1.0)
            self._rest(self.world.now + DAY)
            seen = judge.judge(self.ledger, self.aggregator, self.devices)
        return seen + self.happened

    def _help(self, until: float) -> None:
        """After a loss the operator publishes newer versions of the tasks that ask for it, or that nobody can go on
        with because the broker has forgotten, too."""
        quiet = self.world.run(until, lambda: not self._restless())
        if quiet or self.ledger.broker_forgot:
            for task in sorted(self.versions):
                needed = judge.needs_manifest(self.aggregator, task)
                if needed or not quiet:
                    self._note("manifests needed" if needed else "manifests that end a stalemate")
                    self._publish(task)

    def _restless(self) -> str:
        return judge.restless(self.aggregator, self.devices, self.versions)

    def _rest(self, until: float) -> None:
        if not self.world.run(until, lambda: not self._restless()):
            raise Broken(f"not at rest {DAYS} days after the last fault: {self._restless()}; {self._where()}")

    def _where(self) -> str:
        service = self.aggregator.service
        tasks = {} if service is None else {n: (t.phase, t.last_round) for n, t in service._coordinator.tasks.items()}
        return f"aggregator {'off' if service is None else tasks}, broker {'up' if self.broker.up else 'down'}"

    # -- the operator --

    def _publish(self, task: str) -> None:
        dice, keys = self.world.dice, self.fleet.keys
        version = self.versions[task] = self.versions[task] + 1
        plan = self._plan()
        described = records.manifest(
            keys,
            task,
            version,
            MODEL,
            v=1 if plan.gate is UNSET and plan.until is UNSET else 2,
            expires=int(EPOCH) + 90 * 86_400,
            algorithm=FedAvg(weights=dice.choice(("uniform", "examples"))),
            plan=plan,
            **records.of_width(WIDTH),
        )
        self.world.say(f"operator publishes version {version} of {task}: {plan}")
        blob = chunks.describe(MODEL.weights, CHUNK)
        signed = signing.sign(described, Role.PUBLISHER, keys.publisher)
        self.ledger.manifests[signing.digest(signed)] = described
        release = records.signed_release(signed, task, by=keys.publisher, model=MODEL, v=2, weights=blob)
        message = ReleaseMessage(v=2, manifest=signed, release=release, graphs=Graphs(MODEL.train, MODEL.eval))
        messages = [("models/release", wire.pack(message))]
        if dice.random() < 0.5:
            pieces = enumerate(chunks.pieces(MODEL.weights, CHUNK))
            topics = Topics()
            messages = [(topics.chunk(blob.sha256.hex(), index), bytes(each)) for index, each in pieces] + messages
        else:
            whole = ReleaseMessage(
                v=1, manifest=signed, release=release, graphs=Graphs(MODEL.train, MODEL.eval), weights=MODEL.weights
            )
            messages = [("models/release", wire.pack(whole))]
        self._insist(task, version, messages)

    def _plan(self) -> Plan:
        dice = self.world.dice
        goal = dice.randint(1, len(self.devices))
        judged = dice.random() < 0.2
        return Plan(
            gate=Gate(drop=0.2, reporters=1) if judged else UNSET,
            until=0.85 if judged and dice.random() < 0.5 else UNSET,
            goal=goal,
            min_updates=dice.randint(1, goal),
            rounds=dice.randint(1, 4),
            deadline=dice.choice((60, 300, 3600)),
            max_extension=dice.choice((3600, 86_400)),
            over_select=dice.choice((1.0, 1.3, 2.0)),
            start_jitter=dice.choice((0, 30)),
        )

    def _insist(self, task: str, version: int, messages: list[tuple[str, bytes]]) -> None:
        """Publish as a person does, who looks whether the aggregator took it, and else does it again."""
        service = self.aggregator.service
        known = None if service is None else service._coordinator.tasks.get(task)
        if self.versions[task] > version or (known is not None and known.manifest.version >= version):
            return
        if self.broker.up:
            for topic, payload in messages:
                self.broker.publish("_operator", 0, topic, payload, 1, retain=True)
        self.world.at(600.0, lambda: self._insist(task, version, messages))

    def _command(self) -> None:
        dice = self.world.dice
        task, verb = dice.choice(sorted(self.versions)), dice.choice(("pause", "stop", "rollback", "rollback"))
        self.aggregator.command(verb, task, dice.choice((None, None, 0, 1)) if verb == "rollback" else None)
        self._later(600.0, lambda: self._resume(task))

    def _resume(self, task: str) -> None:
        """Ask for it as a person does, who looks whether it goes on, and else asks again."""
        service = self.aggregator.service
        known = None if service is None else service._coordinator.tasks.get(task)
        if known is None or known.state != "active":
            self.aggregator.command("resume", task)
            self.world.at(600.0, lambda: self._resume(task))

    # -- faults --

    def _plan_faults(self) -> None:
        dice, world = self.world.dice, self.world
        self.aggregator.frailty = dice.choice((0.0, 0.0, 1 / 1000, 1 / 250, 1 / 80))
        for device in self.devices:
            device.frailty = dice.choice((0.0, 0.0, 1 / 1000, 1 / 250, 1 / 80))
            device.clumsy = dice.choice((0.0, 0.0, 0.0, 0.3))
        kinds: tuple[Callable[[], None], ...] = (
            self._crash_device,
            self._crash_aggregator,
            self._stop_broker,
            self._part,
            self._sleep,
            self._set_clock,
            self._fill_disk,
            self._unplug,
            self._command,
            self._black_out,
        )
        weights = [dice.choice((0.0, 0.0, 1.0, 3.0)) for _ in kinds]
        rate = dice.choice((0.0, 2.0, 5.0, 10.0)) / self.trouble
        if rate and any(weights):
            at = 0.0
            while (at := at + dice.expovariate(rate)) < self.trouble:
                world.at(at, dice.choices(kinds, weights)[0])
        for _ in range(5):
            self._later(self.trouble, self.broker.save)
        if dice.random() < 0.25:
            # Of a kind of their own: they change what may be asked of all that follows.
            self._later(self.trouble, self._back_up)
            self._later(self.trouble, dice.choice((self._lose_disk, self._restore, self._restore)))

    def _note(self, what: str) -> None:
        self.happened[what] += 1

    def _crash_device(self) -> None:
        self.world.dice.choice(self.devices).arm(self.world.dice.randint(1, 60))

    def _crash_aggregator(self) -> None:
        self.aggregator.arm(self.world.dice.randint(1, 120))

    def _stop_broker(self) -> None:
        if self.broker.up:
            how = self.world.dice.choice(("kept", "kept", "empty", "older", "forgetful"))
            self._note(f"broker {how}")
            self.ledger.broker_forgot |= how in ("empty", "older")
            self.broker.stop(how)
            self.world.at(self.world.dice.choice((1.0, 60.0, 600.0)), self.broker.start)

    def _part(self) -> None:
        """The network between a program and the broker is gone for a while."""
        program, seconds = self.world.dice.choice(self.programs), self.world.dice.choice((5.0, 200.0, 2000.0))
        if not program.reachable:
            return
        self._note("partitions")
        self.world.say(f"{program.name} is away for {seconds:.0f} s")
        program.reachable = False
        if program.service is not None and program.service._link.connected:
            program.service._link.cut()

        def back() -> None:
            program.reachable = True

        self.world.at(seconds, back)

    def _sleep(self) -> None:
        device = self.world.dice.choice(self.devices)
        seconds = self.world.dice.choice((3600.0,) * 10 + (DAY,) * 3 + (20 * DAY,))
        self._note("sleeps")
        self.world.say(f"{device.name} sleeps for {seconds / DAY:.1f} days")
        device.sleep(seconds)

    def _black_out(self) -> None:
        """The power of the whole site goes; who is back first, and what the broker's disk holds, is chance."""
        dice = self.world.dice
        if self.broker.up:
            how = dice.choice(("kept", "older", "older"))
            self._note(f"blackouts, broker {how}")
            self.ledger.broker_forgot |= how == "older"
            self.broker.stop(how)
            self.world.at(dice.uniform(0.0, 100.0), self.broker.start)
            for program in self.programs:
                program.sleep(dice.uniform(0.0, 100.0))

    def _set_clock(self) -> None:
        dice, program = self.world.dice, self.world.dice.choice(self.programs)
        jump = dice.choice((0.0, 900.0, 900.0, DAY, 400 * DAY, 40 * YEAR))
        program.skew = dice.choice((-jump, jump))
        self.world.say(f"{program.name}: its clock is off by {program.skew:.0f} s")
        program.wake()
        if jump >= DAY:
            self._note("clocks off by a day or years")

            def put_right() -> None:
                program.skew = 0.0
                program.wake()

            self.world.at(dice.choice((60.0, 600.0, 1e9)), put_right)

    def _back_up(self) -> None:
        if self.aggregator.back_up():
            self.world.say("operator makes a backup")
        else:
            self.world.at(60.0, self._back_up)

    def _begin_anew(self) -> None:
        """The aggregator goes on with less than it knew, on a machine whose clock may not have been set yet."""
        self.ledger.forget()
        if self.world.chance(0.3):
            self.aggregator.skew = self.world.dice.choice((DAY, 400 * DAY))
            self.world.at(self.world.dice.choice((700.0, 1500.0)), self._put_clock_right)

    def _put_clock_right(self) -> None:
        self.aggregator.skew = 0.0
        self.aggregator.wake()

    def _lose_disk(self) -> None:
        if self.aggregator.lose_disk(self.world.dice.choice((1.0, 600.0))):
            self._note("disks lost")
            self.world.say("the aggregator's disk is lost")
            self._begin_anew()

    def _restore(self) -> None:
        if self.aggregator.restore(self.world.dice.choice((1.0, 600.0))):
            self._note("restored")
            self.world.say("the aggregator is restored from its backup")
            self._begin_anew()

    def _fill_disk(self) -> None:
        program = self.world.dice.choice(self.programs)
        program.full = True
        self.world.say(f"{program.name}: its disk is full")

        def empty() -> None:
            program.full = False

        self.world.at(self.world.dice.choice((3.0, 60.0, 600.0)), empty)

    def _unplug(self) -> None:
        device = self.world.dice.choice(self.devices)
        self.world.say(f"{device.name} is on battery")
        device.plug(mains=False)
        self._later(600.0, lambda: device.plug(mains=True))

    def _calm(self) -> None:
        """No fault from here on; whoever sleeps wakes when it is time."""
        self.world.say("all is quiet from here on")
        self.broker.faults = Faults(delay=0.02)
        if not self.broker.up:
            self.broker.start()
        for program in self.programs:
            program.calm()
            program.start()
        for task in self.versions:
            self._resume(task)
        self._look_into_quarantine()

    def _look_into_quarantine(self) -> None:
        """The operator finds that nothing in there does any harm."""
        condemned = list((self.aggregator.config.state.directory / "quarantine").glob("*"))
        if condemned:
            self._note("quarantined")
            for path in condemned:
                path.unlink()
            self.aggregator.sleep(1.0)


def run(seed: int, fleet: Fleet, trace: Trace | None = None) -> Counter[str]:
    """One schedule; raises what went wrong."""
    world = World(seed, trace)
    folder = fleet.folder.parent / f"sim-{seed}"  # the same each time: it stands in what is traced
    folder.mkdir()
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
        replay = f"python -m tests.sim.run --seeds {seed} --trace"
        raise Broken(f"seed {seed} fails; replay: {replay}\n{type(error).__name__}: {error}") from error
