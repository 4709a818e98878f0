"""The programs of a simulation: the real services of both daemons with their real stores, on virtual links.

Only what touches the outside is replaced: the link (tests.sim.world), the clock, os.urandom, the sensors, and the
trainer child, in whose place a one-hot delta is sealed for real. So the order of commit, effects and acknowledgement is
the product's own. (Measured before that was decided: a schedule takes about 0.2 s, of which the real SQLite store and
the files, on a file system in memory, are a fifth.)

A crash is an exception between two steps: before, in or after a commit, a file, an effect, a message or an
acknowledgement; the object is dropped and a new one starts from what lies on the disk. A disk that is full refuses
every write until there is room again, while the world goes on around the daemon that waits for it.
"""

import contextlib
import errno
import functools
import gc
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sqlalchemy as sa
import structlog
from msgspec import structs

import aggregator.blobs
import aggregator.download
import aggregator.intake
import aggregator.quarantine
import aggregator.service
import aggregator.sqlite
import edge_agent.clock
import edge_agent.outbox
import edge_agent.service
import edge_agent.store
import shared.driver
import shared.files
import shared.logs
import shared.spool
from aggregator import backup, control
from aggregator import config as aggregator_settings
from aggregator.ports import BlobLost
from edge_agent import config as agent_settings
from edge_agent import participation
from edge_agent.child import TrainerExited, TrainerSaid
from edge_agent.config import Data
from edge_agent.eligibility import DeviceFacts, Policy, Question
from edge_agent.jobs import Done, Failed, Job, Progress, Suspended
from shared import codec, sealing
from shared.control import ControlRequest
from shared.errors import ConfigError, StorageError
from shared.layout import FLOATING, size
from shared.machine import Instant
from shared.messages import PlainBody
from tests.sim.world import EPOCH, Broker, Crash, FakeLink, World

_make_engine = aggregator.sqlite.engine

CERTIFIED = (-2 * 86_400.0, 1095 * 86_400.0)
"""Seconds from the beginning within which the broker's certificate is valid: a clock outside them gets no TLS."""
SPIN = 10_000
"""Turns at one moment after which a daemon will never rest."""


class Watcher(Protocol):
    """Who is told of all that is decided; raises where a promise is broken."""

    def sent(self, program: "Program", topic: str, payload: bytes) -> None:
        """A program hands a message to its link."""

    def stored(self, program: "Program", effects: Sequence[Any]) -> None:
        """What these effects ask for is durable now."""

    def answered(self, device: "Device", effect: participation.Settled) -> None:
        """A device has taken a receipt."""


class Program:
    """A daemon that runs, crashes and comes back. `make` builds its service from its folder."""

    def __init__(self, world: World, broker: Broker, watcher: Watcher, name: str) -> None:
        self.world, self.broker, self.watcher, self.name = world, broker, watcher, name
        self.service: Any = None
        self.reachable = True
        self.skew = 0.0
        """Seconds by which its wall clock is off."""
        self.frailty = 0.0
        """Of each step: that it crashes there."""
        self.full = False
        """Whether its disk is."""
        self.off_until = 0.0
        """It does not start before."""
        self.crashes = self.refusals = 0
        self.pending: Sequence[Any] = ()
        """What is being committed."""
        self._countdown: int | None = None
        self._due: float | None = None
        self._woken = self._waits = False

    @property
    def admitted(self) -> bool:
        """Whether it can reach the broker, and believes its certificate."""
        since = self.world.instant(self.skew).utc - EPOCH
        return self.reachable and CERTIFIED[0] < since < CERTIFIED[1]

    def make(self) -> Any:
        """A service that has started."""
        raise NotImplementedError

    # -- life and death --

    def start(self) -> None:
        """From what lies on the disk."""
        if self.service is not None:
            return
        if self.world.now < self.off_until:
            self.world.at(self.off_until - self.world.now, self.start)
            return
        self.world.say(f"{self.name} starts")
        with self._running():
            self.service = self.make()
            self.service._ending = _Patience(self)
            _stepped(self.service, self)
            self.service._link.start()
            self._turn()

    def arm(self, steps: int) -> None:
        """Crash after so many steps from now."""
        self._countdown = steps

    def calm(self) -> None:
        """No fault of its own any more."""
        self._countdown, self.frailty, self.full, self.skew, self.reachable = None, 0.0, False, 0.0, True

    def step(self) -> None:
        """Between two steps: perhaps the end."""
        if self._countdown is not None:
            self._countdown -= 1
            if self._countdown <= 0:
                self._countdown = None
                raise Crash
        if self.frailty and self.world.chance(self.frailty):
            raise Crash

    def sleep(self, seconds: float) -> None:
        """The power goes, and comes back after so long."""
        self.off_until = max(self.off_until, self.world.now + seconds)
        if self.service is not None and not self._waits:
            self._crash()

    def refuse(self, path: Path) -> None:
        """A write: OSError if the disk is full."""
        if self.full:
            self.refusals += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def pause(self, seconds: float) -> None:
        """Its owner thread waits; the world goes on, and what comes for it is left in the mailbox."""
        running, self.world.running, self._waits = self.world.running, None, True
        try:
            self.world.run(self.world.now + seconds, lambda: False)
        finally:
            self.world.running, self._waits = running, False
        if self.world.now < self.off_until:
            raise Crash

    def _crash(self) -> None:
        self.crashes += 1
        self.world.say(f"{self.name} crashes")
        service, self.service, self._due = self.service, None, None
        if service is None:
            gc.collect()  # half made, and holding its lock
        else:
            service._link.die()
            self.release(service)
        self.world.at(self.world.dice.choice((1.0, 30.0, 600.0)), self.start)

    def release(self, service: Any) -> None:
        """Let the dead process's files go, as the kernel does."""

    # -- work --

    def sends(self, topic: str, payload: bytes) -> None:
        """It hands a message to its link."""
        self.watcher.sent(self, topic, payload)

    def wake(self) -> None:
        """Something was left in its mailbox: look soon, so that some come together."""
        if not self._woken and self.service is not None:
            self._woken = True
            self.world.at(self.world.dice.choice((0.0, 0.001, 0.2)), self._look)

    def _look(self) -> None:
        if self._waits:
            self.world.at(1.0, self._look)
            return
        self._woken = False
        if self.service is not None:
            with self._running():
                self._turn()

    def _turn(self) -> None:
        service = self.service
        for _ in range(SPIN):
            service._driver.turn(0.0)
            due = service.deadline
            if not service.mailbox._events and (due is None or due > self.world.now):
                break
        else:
            raise AssertionError(f"{self.name} spins")
        if due is not None:
            due = max(due, self.world.now + 0.001)
            if self._due is None or due < self._due or self._due <= self.world.now:
                self._due = due
                self.world.at(due - self.world.now, self._ring)

    def _ring(self) -> None:
        if self._due is not None and self._due <= self.world.now:
            self._due = None
            self._look()

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        before, self.world.running = self.world.running, self
        try:
            yield
        except Crash:
            self._crash()
        finally:
            self.world.running = before


class _Patience:
    """In the place of the event that ends a wait for the disk: nobody stops a simulated daemon."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def is_set(self) -> bool:
        return False

    def wait(self, seconds: float) -> bool:
        self._program.pause(seconds)
        return False


class Aggregator(Program):
    """The aggregator."""

    def __init__(self, world: World, broker: Broker, watcher: Watcher, fleet: Path, folder: Path, inline: int) -> None:
        super().__init__(world, broker, watcher, "aggregator")
        loaded = _aggregator_config(fleet / "aggregator" / "aggregator.toml")
        self.config = structs.replace(
            loaded,
            state=structs.replace(loaded.state, directory=folder / "aggregator"),
            limits=structs.replace(loaded.limits, inline_max=inline),
        )
        self._archive = folder / "backup.tar"

    def make(self) -> Any:
        return aggregator.service.Service(self.config, self.world.instant(self.skew))

    def release(self, service: Any) -> None:
        service._store.close()
        service._blobs.close()
        service._lock.close()

    def back_up(self) -> bool:
        """Write a backup, running or not; whether there was anything to write."""
        if self._waits or not self.config.database.exists():
            return False
        with contextlib.suppress(ConfigError):  # a database that is not whole yet
            backup.make(self.config, self._archive, self.world.instant().utc)
            return True
        return False

    def lose_disk(self, seconds: float) -> bool:
        """Its state directory is gone; root and keys lie elsewhere. Off for so long; whether that could be now."""
        if self._waits:
            return False
        self.sleep(seconds)
        for path in (self.config.state.directory / "blobs").glob("?" * 64):
            self.world.archive[bytes.fromhex(path.name)] = path.read_bytes()
        shutil.rmtree(self.config.state.directory, ignore_errors=True)
        return True

    def restore(self, seconds: float) -> bool:
        """Its state directory becomes what the newest backup holds; whether there is one."""
        if self._waits or not self._archive.exists():
            return False
        if self.world.chance(0.5):
            self.lose_disk(seconds)
        else:
            self.sleep(seconds)
        backup.restore(self.config, self._archive, self.world.instant().utc, force=True)
        return True

    def command(self, verb: Any, task: str, to: int | None = None) -> None:
        """The operator asks for something; nobody listens at a dead daemon's door."""
        if self.service is None:
            return
        self.world.say(f"operator: {verb} {task} {'' if to is None else to}")
        told = lambda facts: self.world.say(f"aggregator answers {facts}")  # noqa: E731
        self.service.mailbox.post(ControlRequest(control.Request(verb, task, to), told))
        self.wake()


class Device(Program):
    """A device that contributes the unit vector of its number, over `examples` examples."""

    def __init__(
        self, world: World, broker: Broker, watcher: Watcher, number: int, bundle: Path, folder: Path, inline: int
    ) -> None:
        super().__init__(world, broker, watcher, bundle.name)
        self.number, self.examples = number, 10 + 7 * number
        self.clumsy = 0.0
        """Of each training: that it comes to nothing."""
        self.facts = DeviceFacts(
            local=datetime.fromtimestamp(0, UTC),
            cpu_pressure=0.0,
            memory_pressure=0.0,
            io_pressure=0.0,
            cpu_others=0.0,
            memory_free=1 << 33,
            disk_free=1 << 33,
        )
        loaded = _agent_config(bundle / "agent.toml")
        self.config = structs.replace(
            loaded,
            broker=structs.replace(loaded.broker, inline_max=inline),
            device=structs.replace(loaded.device, state_dir=folder / bundle.name, run_dir=folder / "run"),
            policy=Policy(
                settle=0.0, sense=20_000.0, sense_training=600.0
            ),  # it is woken when there is something to see
            data={"d": Data(path=folder / "d.npz")},
        )

    def make(self) -> Any:
        service = edge_agent.service.Service(self.config, self.world.instant(self.skew))
        service._sensors = self  # type: ignore[assignment]
        service._trainer = FakeTrainer(self, service.mailbox.post)  # type: ignore[assignment]
        return service

    def calm(self) -> None:
        super().calm()
        self.clumsy = 0.0
        self.plug(mains=True)

    def plug(self, *, mains: bool) -> None:
        """Its owner plugs it in, or takes it off the mains."""
        self.facts = replace(self.facts, mains=mains)
        if self.service is not None:
            self.service.mailbox.post(participation.Wake())
            self.wake()

    def read(
        self,
        now: Instant,
        trainer: int | None,
        working: bool,
        trained: float | None,
        asked: frozenset[Question],
        watched: bool,
    ) -> DeviceFacts:
        """In the place of the sensors."""
        since = None if trained is None else now.mono - trained
        return replace(self.facts, local=datetime.fromtimestamp(now.utc, UTC), training=working, since_round=since)


class FakeTrainer:
    """In the place of the trainer child: takes a while, then seals a one-hot delta."""

    def __init__(self, device: Device, post: Callable[[Any], None]) -> None:
        self._device, self._post, self._world = device, post, device.world
        self.pid: int | None = None
        self._job: Job | None = None
        self._frozen = False
        self._ripe: Job | None = None
        self._pids = iter(range(100, 1 << 30))

    def submit(self, job: Job) -> int:
        """Take a job."""
        if self.pid is None:
            self.pid = next(self._pids)
        self._job = job
        self._world.at(0.2, lambda: self._begin(job))
        self._world.at(self._world.dice.choice((0.5, 5.0, 60.0)), lambda: self._finish(job))
        return self.pid

    def cancel(self, id: str) -> None:
        """End a job before its time."""
        if self._job is not None and self._job.id == id:
            self._say(Failed(id, "cancelled", "no longer wanted"))
            self._job = None

    def suspend(self, id: str) -> None:
        """Leave a job, to be gone on with."""
        if self._job is not None and self._job.id == id:
            self._say(Suspended(id, True))
            self._job = None
        self.thaw()

    def freeze(self) -> None:
        """Stand still."""
        self._frozen = True

    def thaw(self) -> None:
        """Go on; what would have been done meanwhile is done now."""
        self._frozen = False
        if self._ripe is not None:
            ripe, self._ripe = self._ripe, None
            self._world.at(0.5, lambda: self._finish(ripe))

    def stop(self, kill: bool = False) -> None:
        """End the child."""
        self._exit("stopped")

    def rss(self) -> int | None:
        """Nothing that weighs."""
        return None

    def _exit(self, cause: Any) -> None:
        if self.pid is not None:
            pid, self.pid, self._job = self.pid, None, None
            self._frozen, self._ripe = False, None
            self._world.at(0.1, lambda: self._hand(TrainerExited(pid, cause, 0, None)))

    def _begin(self, job: Job) -> None:
        if self._job is job and not self._frozen:
            self._say(Progress(job.id, "training", 1, 1, 1))

    def _finish(self, job: Job) -> None:
        device = self._device
        if self._job is not job or device.service is None or device.service._trainer is not self:
            return
        if self._frozen:
            self._ripe = job
            return
        if self._world.chance(device.clumsy):
            self._world.dice.choice((lambda: self._exit("crashed"), lambda: self._fail(job)))()
            return
        self._job = None
        sizes = [size(spec) for spec in job.layout if spec.dtype in FLOATING]
        delta = np.zeros(sum(sizes), np.float32)
        delta[device.number] = 1.0
        metrics = {"accuracy": self._world.dice.choice((0.1, 0.5, 0.5, 0.9)), "loss": 1.0}
        header = PlainBody(device.examples, 1, metrics, 5)
        encapsulation, sealed = sealing.seal(header, codec.encode(job.codec, delta, sizes), job.hpke_key, job.context)
        if device.full:
            self._say(Failed(job.id, "storage", "no room"))
            return
        shared.files.write_durably(Path(job.output), sealed)
        digest = sha256(sealed).digest()
        self._say(
            Done(job.id, encapsulation, len(sealed), digest, device.examples, 1, 5, metrics, 1.0, 1.0, 1.0, 1.0, 1)
        )

    def _fail(self, job: Job) -> None:
        self._job = None
        self._say(Failed(job.id, "out_of_memory", "there was none"))

    def _say(self, message: Done | Failed | Progress | Suspended) -> None:
        assert self.pid is not None
        self._hand(TrainerSaid(self.pid, message))

    def _hand(self, event: Any) -> None:
        if self._device.service is not None and self._device.service._trainer is self:
            self._post(event)
            self._device.wake()


# -- steps -------------------------------------------------------------------------------------------------------


def _stepped(service: Any, program: Program) -> None:
    """Put a step before and after everything that the shell does."""
    commit, perform, settle = service.commit, service.perform, service.settle

    def committed(effects: Sequence[Any]) -> None:
        program.step()
        program.pending = effects
        try:
            commit(effects)
        finally:
            program.pending = ()
        if isinstance(program, Device):
            program.watcher.stored(program, effects)
        program.step()

    def performed(effect: Any) -> Iterable[Any]:
        program.step()
        if isinstance(effect, participation.Settled) and isinstance(program, Device):
            program.watcher.answered(program, effect)
        found = list(perform(effect))
        program.step()
        return found

    def settled(event: Any) -> None:
        program.step()
        settle(event)

    service.commit, service.perform, service.settle = committed, performed, settled
    if isinstance(program, Aggregator):
        _step_store(service, program)


def _step_store(service: Any, program: Program) -> None:
    transaction, put_all = service._store.transaction, service._blobs.put_all

    @contextlib.contextmanager
    def stepped() -> Iterator[None]:
        try:
            with transaction():
                yield
                program.step()  # everything written, nothing committed
                program.refuse(program.config.database)  # type: ignore[attr-defined]
        except OSError as error:
            raise StorageError.of("aggregator.db", error) from None
        program.watcher.stored(program, program.pending)
        program.pending = ()
        program.step()

    def put(pieces: Any) -> None:
        try:
            program.refuse(Path("journal"))
        except OSError as error:
            raise StorageError.of("journal", error) from None
        put_all(pieces)
        program.step()

    service._store.transaction, service._blobs.put_all = stepped, put


@contextlib.contextmanager
def virtual(world: World) -> Iterator[None]:
    """Everything that reads a clock or a dice reads the world's, and writing a file is a step."""
    durably, spooled = shared.files.write_durably, shared.spool.Spool.write

    def written(path: Path, data: Any) -> None:
        program = world.running
        if isinstance(program, Program):
            program.step()
            program.refuse(path)
            try:
                program.step()
            except Crash:
                path.with_name(f".{path.name}.new").write_bytes(bytes(data[: len(data) // 2]))
                raise
        durably(path, data)
        if isinstance(program, Program):
            program.step()

    def gathered(spool: shared.spool.Spool, index: int, data: Any) -> None:
        program = world.running
        if isinstance(program, Program):
            program.step()
            try:
                program.refuse(spool.path)
            except OSError as error:
                raise StorageError.of(spool.path, error) from None
        spooled(spool, index, data)

    def clock() -> Instant:
        running = world.running
        return world.instant(running.skew if isinstance(running, Program) else 0.0)

    patches: list[tuple[Any, str, Any]] = [(os, "urandom", world.random_bytes)]
    for module in (aggregator.service, aggregator.intake, aggregator.quarantine, edge_agent.service, shared.driver):
        patches.append((module, "read_clock", clock))
    for module in (aggregator.service, edge_agent.service):
        patches.append((module, "Link", FakeLink))
    patches.append((aggregator.sqlite, "engine", _engine))
    if not world.traced:
        patches.append((shared.logs, "structlog", _Deaf()))
    for module in (
        aggregator.blobs,
        aggregator.service,
        aggregator.download,
        edge_agent.store,
        edge_agent.outbox,
        edge_agent.clock,
    ):
        patches.append((module, "write_durably", written))
    patches.append((shared.spool.Spool, "write", gathered))
    patches.append((edge_agent.clock, "synchronised", lambda: clock() == world.instant()))
    patches.append((aggregator.blobs.Blobs, "delete", _archiving(world)))
    before = [(module, name, getattr(module, name)) for module, name, _ in patches]
    structlog.configure(processors=[_Teller(world)], cache_logger_on_first_use=False)
    for module, name, value in patches:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        structlog.reset_defaults()


_engines: list[sa.Engine] = []


def _engine(path: Path, *, read_only: bool) -> sa.Engine:
    """As the product makes it, but all engines of a process share what SQLAlchemy has compiled."""
    made = _make_engine(path, read_only=read_only)
    _engines[1:] = []
    _engines.append(made)
    made.dialect, made._compiled_cache = _engines[0].dialect, _engines[0]._compiled_cache
    return made


class _Deaf:
    """In the place of structlog where nobody listens."""

    def get_logger(self) -> "_Deaf":
        return self

    def __getattr__(self, level: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _archiving(world: World) -> Callable[[Any, bytes], None]:
    """Deleting a blob, with a copy for the judge."""
    delete = aggregator.blobs.Blobs.delete

    def archived(blobs: Any, name: bytes) -> None:
        with contextlib.suppress(BlobLost):
            world.archive[name] = bytes(blobs.get(name))
        delete(blobs, name)

    return archived


class _Teller:
    """Puts the daemons' events into the trace, and nowhere else."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __call__(self, _logger: Any, _method: str, event: Any) -> Any:
        if self._world.traced:
            who = self._world.running.name if self._world.running is not None else "-"
            fields = " ".join(
                f"{name}={value}" for name, value in event.items() if name != "event" and value is not None
            )
            self._world.say(f"{who}: {event['event']} {fields}"[:300])
        raise structlog.DropEvent


@functools.cache
def _aggregator_config(path: Path) -> aggregator_settings.AggregatorConfig:
    return aggregator_settings.load(path, {})


@functools.cache
def _agent_config(path: Path) -> agent_settings.AgentConfig:
    return agent_settings.load(path, {})


def clean(folder: Path) -> None:
    """Remove what a schedule left."""
    shutil.rmtree(folder, ignore_errors=True)
