"""A fleet of light devices: real broker, real aggregator, real agents; only what they would learn is made up.

Device i contributes the unit vector e_i (tests/broker/light_trainer.py), so after any crash each cell of a round's sum
tells how often its device was counted.
"""

import shutil
import sqlite3
import sys
from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt

from shared import tensors, wire
from shared.messages import FedAvg, Plan
from tests.broker.broker import Fleet, Peer
from tests.broker.nursery import ROOT, Forked, Nursery
from tests.hostile import records
from tests.hostile.daemon import Daemon, until
from tests.hostile.field import POLICY

TASK = "main"
Sum = npt.NDArray[np.float64]


def note(text: str) -> None:
    """A figure or a seed, for whoever reads what the tests say (`-s`, or when one fails)."""
    print(f"\n{text}")  # noqa: T201


class Light:
    """One device: an agent with its folder, and the cell that is its to fill. With a nursery it is forked there."""

    def __init__(self, fleet: Fleet, cell: int, nursery: Nursery | None = None) -> None:
        self._keepalive = 60
        self.name, self.cell = f"light-{cell:02}", cell
        self.folder = fleet.bundle(self.name)
        self.state = self.folder / "state"
        shutil.rmtree(self.state, ignore_errors=True)
        self._write(fleet.port)
        config = self.folder / "agent.toml"
        self.daemon = Daemon("edge_agent", config) if nursery is None else Forked(nursery, config)
        self.daemon.log.write_bytes(b"")

    def _write(self, port: int) -> None:
        trainer, data = self.folder / "trainer", self.folder / "cell.csv"
        trainer.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -P -m tests.broker.light_trainer\n')
        trainer.chmod(0o700)
        data.write_text(str(self.cell))
        (self.folder / "agent.toml").write_text(
            f'[broker]\nhost = "localhost"\nport = {port}\nkeepalive = {self._keepalive}\n\n'
            f'[device]\nstate_dir = "{self.state}"\nrun_dir = "{self.folder}/run"\n\n'
            f'[trainer]\npython = "{trainer}"\n\n[data.d]\npath = "{data}"\n{POLICY}'
        )

    def reach(self, port: int, keepalive: int = 60) -> None:
        """Let it believe the broker to be at this port, a relay's for instance, from its next start on."""
        self._keepalive = keepalive
        self._write(port)

    def accepted(self, task: str = TASK) -> set[int]:
        """The rounds for which it read a receipt that says so."""
        return {
            line["round"]
            for line in self.daemon.read()
            if line["event"] == "update.answered" and line["outcome"] == "accepted" and line["task"] == task
        }


class Plot:
    """The fleet's aggregator and its light devices, none of them started yet; all end with it."""

    def __init__(self, fleet: Fleet, count: int, nursery: Nursery | None = None) -> None:
        self.fleet, self.keys = fleet, records.load_keys(fleet)
        home = fleet.folder / "aggregator"
        self.state = home / "state"
        shutil.rmtree(self.state, ignore_errors=True)
        self.aggregator = Daemon("aggregator", home / "aggregator.toml")
        self.aggregator.log.write_bytes(b"")
        self.devices = [Light(fleet, cell, nursery) for cell in range(count)]
        self.beds: list[Bed] = []

    def __enter__(self) -> "Plot":
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in self.daemons:
            daemon.kill()

    @property
    def daemons(self) -> list[Daemon]:
        """The aggregator first."""
        return [self.aggregator, *(device.daemon for device in self.devices)]

    def publish(self, plan: Plan, task: str = TASK, cells: int = 0) -> "Bed":
        """Release 0 of a task with at least a cell for each device, all zeros; each update weighs the same."""
        bed = Bed(self, task, -(-max(cells, len(self.devices)) // 3))
        of, uniform = records.wide(bed.width), FedAvg(weights="uniform")
        described = records.manifest(
            self.keys, task, 1, of, plan=plan, algorithm=uniform, **records.of_width(bed.width)
        )
        with Peer(self.fleet, self.fleet.operator) as operator:
            message = wire.pack(records.release(self.keys, described, of))
            assert operator.publish("models/release", message, retain=True) < 128
        self.beds.append(bed)
        return bed

    def end(self) -> None:
        """Stop everybody, in order, and keep the last weights."""
        for daemon in self.daemons:
            daemon.stop()
            assert daemon.read()[-1]["event"] == "daemon.stopped"
        for bed in self.beds:
            bed.look()

    def query(self, text: str) -> list[Any]:
        """What the aggregator's database says."""
        with sqlite3.connect(f"file:{self.state}/aggregator.db?mode=ro", uri=True) as database:
            return database.execute(text).fetchall()

    def check_alive(self) -> None:
        """AssertionError, with the end of its log, if a daemon has died."""
        for daemon in self.daemons:
            daemon.check()


class Bed:
    """One task, and the weights of its releases as far as they were seen."""

    def __init__(self, plot: Plot, task: str, width: int) -> None:
        self.plot, self.task, self.width = plot, task, width
        self.seen: dict[int, Sum] = {}

    def look(self) -> int:
        """Keep the newest release's weights, which are gone some rounds later; returns its number, or -1."""
        newest = self.plot.query(
            f"SELECT number, weights FROM releases WHERE task = '{self.task}' ORDER BY number DESC LIMIT 1"
        )
        if not newest:
            return -1
        ((number, blob),) = newest
        if number not in self.seen:
            path = self.plot.state / "blobs" / blob.hex()
            try:
                found = tensors.load(path.read_bytes(), records.layout_of(self.width))
            except FileNotFoundError:
                return int(number)  # a newer one has come in this moment
            self.seen[number] = found["weight"].ravel().astype(np.float64)
        return int(number)

    def released(self, number: int, seconds: float) -> int:
        """Wait for a release of at least this number; no daemon may die meanwhile."""

        def found() -> int | None:
            newest = self.look()
            self.plot.check_alive()
            return newest if newest >= number else None

        return until(found, f"release {number} of {self.task}", seconds)

    def audit(self) -> "Audit":
        """Compare weights, rows and receipts; AssertionError where they do not tell the same story."""
        return Audit(self)


class Audit:
    """What the rounds that were released say.

    Every release that was seen is its predecessor plus the mean of exactly its rows; a row stands for one device; every
    `accepted` that a device has read is a row. A cell counted twice or lost shows as a wrong sum.
    """

    def __init__(self, bed: Bed) -> None:
        plot, of = bed.plot, f"task = '{bed.task}'"
        rounds = plot.query(f"SELECT round FROM rounds WHERE {of} AND state = 'released' ORDER BY round")
        rows: dict[int, set[int]] = defaultdict(set)
        for origin, collected, name, outcome in plot.query(
            f"SELECT origin_round, collected_in, device, outcome FROM contributions WHERE {of}"
        ):
            if outcome == "accepted":
                assert origin == collected
                cell = int(name.removeprefix("light-"))
                assert cell not in rows[origin], f"{name} twice in round {origin}"
                rows[origin].add(cell)
        self.rounds = [number for (number,) in rounds]
        self.updates = sum(len(rows[number]) for number in self.rounds)
        seen = sorted(bed.seen)
        assert seen[-1] == len(self.rounds), "a release for each round that was released, and the last one seen"
        self.seen = len(seen)
        expected = np.zeros_like(bed.seen[seen[0]])
        sums = [expected]
        for number in self.rounds:
            mean = np.zeros_like(expected)
            mean[list(rows[number])] = 1.0 / len(rows[number])
            sums.append(sums[-1] + mean)
        for release in seen:
            wrong = np.flatnonzero(np.abs(bed.seen[release] - sums[release]) > 1e-4)
            assert not len(wrong), f"release {release} is wrong in cells {wrong.tolist()}"
        self.receipts = 0
        for device in plot.devices:
            answered = device.accepted(bed.task)
            lost = [number for number in answered if device.cell not in rows[number]]
            assert not lost, f"{device.name} was told `accepted` for rounds {lost}, which do not know it"
            self.receipts += len(answered)
