"""The programs of a simulation: the real services of both daemons with their real stores, on virtual links.

Only what touches the outside is replaced: the link (tests.sim.world), the clock, os.urandom, the sensors, and the
trainer child, in whose place a one-hot delta is sealed for real. So the order of commit, effects and acknowledgement is
the product's own. A crash is an exception between two steps: before or after a commit, a file, an effect, a message or
an acknowledgement; the object is dropped and a new one starts from what lies on the disk.
"""

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from msgspec import structs

import aggregator.blobs
import aggregator.download
import aggregator.quarantine
import aggregator.service
import edge_agent.clock
import edge_agent.outbox
import edge_agent.service
import edge_agent.store
import shared.driver
import shared.files
from aggregator import config as aggregator_settings
from aggregator.ports import BlobLost
from edge_agent import config as agent_settings
from edge_agent import participation
from edge_agent.child import TrainerExited, TrainerSaid
from edge_agent.config import Data
from edge_agent.eligibility import DeviceFacts, Policy
from edge_agent.jobs import Done, Failed, Job
from shared import codec, sealing
from shared.layout import FLOATING, size
from shared.machine import Instant
from shared.messages import PlainBody
from tests.sim.world import Broker, Crash, FakeLink, World

SPIN = 10_000
"""Turns at one moment after which a daemon will never rest."""
INLINE = 64
"""Bytes that ride along in a simulation, where all is small."""


@functools.cache
def _aggregator_config(path: Path) -> aggregator_settings.AggregatorConfig:
    return aggregator_settings.load(path, {})


@functools.cache
def _agent_config(path: Path) -> agent_settings.AgentConfig:
    return agent_settings.load(path, {})


class Program:
    """A daemon that runs, crashes and comes back. `make` builds its service from its folder."""

    def __init__(self, world: World, broker: Broker, name: str) -> None:
        self.world, self.broker, self.name = world, broker, name
        self.service: Any = None
        self.reachable = True
        self.skew = 0.0
        """Seconds by which its wall clock is off."""
        self.crashes = 0
        self._countdown: int | None = None
        self._due: float | None = None
        self._woken = False

    def make(self) -> Any:
        """A service that has started."""
        raise NotImplementedError

    def start(self) -> None:
        """From what lies on the disk."""
        if self.service is not None:
            return
        self.world.say(f"{self.name} starts")
        with self._running():
            self.service = self.make()
            _stepped(self.service, self)
            self.service._link.start()
            self._turn()

    def arm(self, steps: int) -> None:
        """Crash after so many steps from now."""
        self._countdown = steps

    def calm(self) -> None:
        """No crash any more."""
        self._countdown = None

    def step(self) -> None:
        """Between two steps: perhaps the end."""
        if self._countdown is not None:
            self._countdown -= 1
            if self._countdown <= 0:
                self._countdown = None
                raise Crash

    def wake(self) -> None:
        """Something was left in its mailbox: look soon, so that some come together."""
        if not self._woken and self.service is not None:
            self._woken = True
            self.world.at(self.world.dice.choice((0.0, 0.001, 0.2)), self._look)

    def _look(self) -> None:
        self._woken = False
        if self.service is not None:
            with self._running():
                self._turn()

    def _turn(self) -> None:
        for _ in range(SPIN):
            if not self.service._driver.turn(0.0):
                break
        else:
            raise AssertionError(f"{self.name} spins")
        due = self.service.deadline
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

    def _crash(self) -> None:
        self.crashes += 1
        self.world.say(f"{self.name} crashes")
        service, self.service, self._due = self.service, None, None
        if service is not None:
            service._link.die()
            self.release(service)
        self.world.at(self.world.dice.choice((1.0, 30.0, 600.0)), self.start)

    def release(self, service: Any) -> None:
        """Let the dead process's files go, as the kernel does."""


class Aggregator(Program):
    """The aggregator."""

    def __init__(self, world: World, broker: Broker, fleet: Path, folder: Path) -> None:
        super().__init__(world, broker, "aggregator")
        loaded = _aggregator_config(fleet / "aggregator" / "aggregator.toml")
        limits = structs.replace(loaded.limits, keep_releases=10_000, inline_max=INLINE)
        self.config = structs.replace(
            loaded, state=structs.replace(loaded.state, directory=folder / "aggregator"), limits=limits
        )

    def make(self) -> Any:
        return aggregator.service.Service(self.config, self.world.instant(self.skew))

    def release(self, service: Any) -> None:
        service._store.close()
        service._blobs.close()
        service._lock.close()


class Device(Program):
    """A device that contributes the unit vector of its number."""

    def __init__(self, world: World, broker: Broker, number: int, bundle: Path, folder: Path) -> None:
        super().__init__(world, broker, bundle.name)
        self.number = number
        self.answers: list[tuple[str, int, int, str]] = []
        """(task, manifest version, round, outcome) of every receipt that it has settled."""
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
            broker=structs.replace(loaded.broker, inline_max=INLINE),
            device=structs.replace(loaded.device, state_dir=folder / bundle.name, run_dir=folder / "run"),
            policy=Policy(settle=0.0, sense=3600.0, sense_training=600.0),
            data={"d": Data(path=folder / "d.npz")},
        )

    def make(self) -> Any:
        service = edge_agent.service.Service(self.config, self.world.instant(self.skew))
        service._sensors = self  # type: ignore[assignment]
        service._trainer = FakeTrainer(self, service.mailbox.post)  # type: ignore[assignment]
        return service

    def read(self, now: Instant, trainer: int | None, working: bool, trained: float | None) -> DeviceFacts:
        """In the place of the sensors."""
        since = None if trained is None else now.mono - trained
        return replace(self.facts, local=datetime.fromtimestamp(now.utc, UTC), training=working, since_round=since)


class FakeTrainer:
    """In the place of the trainer child: takes a while, then seals a one-hot delta."""

    def __init__(self, device: Device, post: Callable[[Any], None]) -> None:
        self._device, self._post, self._world = device, post, device.world
        self.pid: int | None = None
        self._job: Job | None = None
        self._pids = iter(range(100, 1 << 30))

    def submit(self, job: Job) -> int:
        """Take a job."""
        if self.pid is None:
            self.pid = next(self._pids)
        self._job = job
        self._world.at(self._world.dice.choice((0.5, 5.0, 60.0)), lambda: self._finish(job))
        return self.pid

    def cancel(self, id: str) -> None:
        """End a job before its time."""
        if self._job is not None and self._job.id == id:
            self._say(Failed(id, "cancelled", "no longer wanted"))
            self._job = None

    def stop(self, kill: bool = False) -> None:
        """End the child."""
        if self.pid is not None:
            pid, self.pid, self._job = self.pid, None, None
            self._world.at(0.1, lambda: self._hand(TrainerExited(pid, "stopped", 0, None)))

    def rss(self) -> int | None:
        """Nothing that weighs."""
        return None

    def _finish(self, job: Job) -> None:
        device = self._device
        if self._job is not job or device.service is None or device.service._trainer is not self:
            return
        self._job = None
        sizes = [size(spec) for spec in job.layout if spec.dtype in FLOATING]
        delta = np.zeros(sum(sizes), np.float32)
        delta[device.number] = 1.0
        header = PlainBody(10, 1, {"accuracy": 0.5, "loss": 1.0}, 5)
        encapsulation, sealed = sealing.seal(header, codec.encode(job.codec, delta, sizes), job.hpke_key, job.context)
        shared.files.write_durably(Path(job.output), sealed)
        digest = sha256(sealed).digest()
        self._say(Done(job.id, encapsulation, len(sealed), digest, 10, 1, 5, header.metrics, 1.0, 1.0, 1.0, 1.0, 1))

    def _say(self, message: Done | Failed) -> None:
        assert self.pid is not None
        self._hand(TrainerSaid(self.pid, message))

    def _hand(self, event: Any) -> None:
        if self._device.service is not None and self._device.service._trainer is self:
            self._post(event)
            self._device.wake()


def _stepped(service: Any, program: Program) -> None:
    """Put a step before and after everything that the shell does."""
    commit, perform, settle = service.commit, service.perform, service.settle

    def committed(effects: Sequence[Any]) -> None:
        program.step()
        commit(effects)
        program.step()

    def performed(effect: Any) -> Iterable[Any]:
        program.step()
        if isinstance(effect, participation.Settled) and isinstance(program, Device):
            update = effect.update
            program.answers.append((update.task, update.position[0], update.position[1], effect.outcome.value))
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
        with transaction():
            yield
            program.step()  # everything written, nothing committed
        program.step()

    def put(pieces: Any) -> None:
        put_all(pieces)
        program.step()

    service._store.transaction, service._blobs.put_all = stepped, put


@contextlib.contextmanager
def virtual(world: World) -> Iterator[None]:
    """Everything that reads a clock or a dice reads the world's, and writing a file is a step."""
    durably = shared.files.write_durably

    def written(path: Path, data: Any) -> None:
        if world.running is not None:
            world.running.step()
        durably(path, data)
        if world.running is not None:
            world.running.step()

    def clock() -> Instant:
        running = world.running
        return world.instant(running.skew if isinstance(running, Program) else 0.0)

    patches: list[tuple[Any, str, Any]] = [(os, "urandom", world.random_bytes)]
    for module in (aggregator.service, aggregator.quarantine, edge_agent.service, shared.driver):
        patches.append((module, "read_clock", clock))
    for module in (aggregator.service, edge_agent.service):
        patches.append((module, "Link", FakeLink))
    for module in (aggregator.service, aggregator.download, edge_agent.store, edge_agent.outbox, edge_agent.clock):
        patches.append((module, "write_durably", written))
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
        if self._world._trace is not None:
            who = self._world.running.name if self._world.running is not None else "-"
            fields = " ".join(
                f"{name}={value}" for name, value in event.items() if name != "event" and value is not None
            )
            self._world.say(f"{who}: {event['event']} {fields}"[:300])
        raise structlog.DropEvent


def clean(folder: Path) -> None:
    """Remove what a schedule left."""
    shutil.rmtree(folder, ignore_errors=True)
