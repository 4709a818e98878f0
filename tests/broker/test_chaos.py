"""Fifty devices, rounds one after the other, and kill -9 of whatever comes to hand: nothing is lost or counted twice.

Fails when: a release differs from its predecessor plus the mean of its rows; a device read `accepted` for a round that
does not hold it; rounds stop; a daemon ends by itself or writes anything but its log; memory grows.
Does not fail when: a round takes long, is extended, or goes on without devices that were just killed.
The order of kills follows from the seed, which is printed (CHAOS_SEED=... repeats it); the instants are the machine's.
"""

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import pytest

from shared.messages import Plan
from tests.broker.broker import Fleet
from tests.broker.nursery import Nursery
from tests.broker.plot import TASK, Plot, note
from tests.hostile.daemon import memory, until

DEVICES = 50
SURVIVORS = 4
"""Devices that are never killed: their memory is watched."""
BURST = 10
"""Kills between two times at which a further release must come."""
PATIENCE = 240.0
"""Seconds that anything may take on a machine that does other things too."""
PLAN = Plan(goal=40, min_updates=25, rounds=1_000_000, deadline=20, max_extension=40, over_select=100.0)
WIDE = 60_000
"""Values of the second task's model: 240 KB, so that its updates go up in chunks and the first one's ride along."""
WIDE_PLAN = Plan(goal=16, min_updates=8, rounds=1_000_000, deadline=20, max_extension=40, over_select=1.3)
MEGABYTE = 1 << 20

Kind = Literal["aggregator", "broker", "device"]


@dataclass(frozen=True)
class Blow:
    """One kill -9, and the start after it."""

    kind: Kind
    cell: int
    """Which device, if it is one."""
    down: float
    """Seconds until it is started again."""
    gap: float
    """Seconds until the next blow."""
    ripe: bool
    """Of the aggregator: only when it is at work, not while it still starts, as it does for most of a storm."""


def blows(seed: int, count: int) -> list[Blow]:
    """The storm of this seed."""
    dice = random.Random(seed)
    kinds: list[Kind] = ["device", "aggregator", "broker"]
    return [
        Blow(
            dice.choices(kinds, [60, 17, 23])[0],
            dice.randrange(SURVIVORS, DEVICES),
            dice.expovariate(1 / 0.3),
            dice.expovariate(1 / 0.15),
            dice.random() < 0.75,
        )
        for _ in range(count)
    ]


@dataclass
class Storm:
    """Strikes, and starts again what it struck."""

    plot: Plot
    kills: Counter[str] = field(default_factory=Counter)
    peaks: Counter[str] = field(default_factory=Counter)
    """The most memory that one of a kind had when it was killed, in bytes."""
    _down: dict[str, tuple[float, Callable[[], None]]] = field(default_factory=dict)
    """Name -> when to start it, and how."""
    _born: int = 0
    """Lines that the aggregator's log had before its newest start."""

    def rage(self, order: list[Blow]) -> None:
        """In bursts, after each of which a further release of the first task must come."""
        for start in range(0, len(order), BURST):
            main, wide = self.plot.beds
            before = main.look()
            for blow in order[start : start + BURST]:
                self._strike(blow)
                time.sleep(blow.gap)  # the instant is what this is about
                self._revive(time.monotonic())
            self._revive(float("inf"))
            wide.look()
            main.released(before + 1, PATIENCE)

    def _strike(self, blow: Blow) -> None:
        plot = self.plot
        if blow.kind == "broker":
            broker = plot.fleet.broker
            self._end(blow, blow.kind, lambda: broker.pid, broker.kill, broker.start)
            return
        daemon = plot.aggregator if blow.kind == "aggregator" else plot.devices[blow.cell].daemon
        name = blow.kind if blow.kind == "aggregator" else plot.devices[blow.cell].name
        if blow.kind == "aggregator" and blow.ripe:
            self._revive(float("inf"))  # it may be the broker that it waits for
            until(self._at_work, "an aggregator at work", PATIENCE)
        self._end(blow, name, lambda: daemon.pid, daemon.kill, daemon.start)

    def _at_work(self) -> bool | None:
        lines = self.plot.aggregator.read()[self._born :]
        return any(line["event"] == "link.up" for line in lines) or None

    def _end(
        self, blow: Blow, name: str, pid: Callable[[], int | None], kill: Callable[[], None], start: Callable[[], None]
    ) -> None:
        self._revive(float("inf"), name)
        living = pid()
        assert living is not None, f"{name} has died"
        self.peaks[blow.kind] = max(self.peaks[blow.kind], memory(living, "VmHWM"))
        kill()
        self.kills[blow.kind] += 1
        self._down[name] = time.monotonic() + blow.down, start

    def _revive(self, now: float, name: str | None = None) -> None:
        for each in [each for each, (due, _) in self._down.items() if due <= now and name in (None, each)]:
            _, start = self._down.pop(each)
            if each == "aggregator":
                self._born = len(self.plot.aggregator.read())
            start()


@pytest.fixture
def plot(fleet: Fleet) -> Iterator[Plot]:
    """The fleet, its first round open."""
    conf = fleet.folder / "broker" / "mosquitto.conf"
    # Saved often, a killed broker comes back with something older; seldom, with nothing.
    conf.write_text(conf.read_text().replace("autosave_interval 300", "autosave_interval 2"))
    fleet.fresh_broker()
    with Nursery() as nursery, Plot(fleet, DEVICES, nursery) as made:
        made.aggregator.start()
        made.aggregator.wait("link.up")
        made.publish(PLAN)
        made.publish(WIDE_PLAN, "wide", WIDE)
        for device in made.devices:
            device.daemon.start()
        yield made


def calm(plot: Plot) -> None:
    """Two more rounds of each task."""
    for bed, number in [(bed, bed.look()) for bed in plot.beds]:
        bed.released(max(0, number) + 2, PATIENCE)


def weather(plot: Plot, kills: int) -> None:
    """Two calm rounds, so many kills, two calm rounds; then the books."""
    seed = int(os.environ.get("CHAOS_SEED", random.randrange(1 << 32)))
    note(f"CHAOS_SEED={seed}")
    began = time.monotonic()
    calm(plot)
    watched = [device.daemon for device in plot.devices[:SURVIVORS]]
    before = [memory(daemon.pid, "VmRSS") for daemon in watched]
    ready = time.monotonic()
    storm = Storm(plot)
    storm.rage(blows(seed, kills))
    over = time.monotonic()
    calm(plot)
    grown = max(memory(daemon.pid, "VmRSS") - size for daemon, size in zip(watched, before, strict=True))
    plot.end()
    peaks = {kind: peak // MEGABYTE for kind, peak in storm.peaks.items()}
    note(
        f"{storm.kills.total()} kills {dict(storm.kills)}; {ready - began:.0f} s to begin, {over - ready:.0f} s of "
        f"kills; peaks in MB {peaks}, grown {grown / MEGABYTE:.1f} MB"
    )
    for bed in plot.beds:
        audit = bed.audit()
        note(
            f"{bed.task}: {len(audit.rounds)} rounds, {audit.seen - 1} of their releases checked, {audit.updates} "
            f"updates, {audit.receipts} receipts"
        )
        assert len(audit.rounds) >= (kills // BURST if bed.task == TASK else 0) + 4
        assert audit.seen > len(audit.rounds) // 2
    assert storm.kills.total() == kills and set(storm.kills) == {"device", "aggregator", "broker"}
    assert grown < 8 * MEGABYTE
    assert storm.peaks["device"] < 80 * MEGABYTE
    assert storm.peaks["aggregator"] < 250 * MEGABYTE
    assert storm.peaks["broker"] < 100 * MEGABYTE


@pytest.mark.timeout(1800)
def test_a_hundred_kills(plot: Plot) -> None:
    """kill -9 of aggregator, broker and devices, 100 times: each accepted update is in its round's sum, once."""
    weather(plot, 100)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_a_thousand_kills(plot: Plot) -> None:
    """The same for long."""
    weather(plot, int(os.environ.get("CHAOS_KILLS", "1000")))
