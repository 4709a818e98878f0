"""The aggregator's disk is lost in the middle of a task, and comes back from a backup that was made while it ran."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shared.messages import Plan
from tests.broker.broker import Fleet
from tests.broker.nursery import Nursery
from tests.broker.plot import TASK, Plot, note
from tests.hostile.daemon import until

DEVICES = 3
PLAN = Plan(goal=DEVICES, min_updates=DEVICES, rounds=24, deadline=3600, start_jitter=1, over_select=100.0)
"""Every device contributes to every round, so that a release says by itself how many rounds it holds."""
CELLS = 30_000
"""Values of the model: 120 KB, so that releases and updates come in chunks."""


@pytest.fixture
def plot(fleet: Fleet) -> Iterator[Plot]:
    """All devices at work."""
    fleet.fresh_broker()
    with Nursery() as nursery, Plot(fleet, DEVICES, nursery) as made:
        made.aggregator.start()
        made.aggregator.wait("link.up")
        made.publish(PLAN, cells=CELLS)
        for device in made.devices:
            device.daemon.start()
        yield made


def command(plot: Plot, *arguments: str) -> None:
    """An operator's command, as a process of its own."""
    config = plot.fleet.folder / "aggregator" / "aggregator.toml"
    subprocess.run(
        [sys.executable, "-m", "aggregator.cli", *arguments, "--config", str(config)], check=True, timeout=60
    )


@pytest.mark.timeout(300)
def test_a_lost_disk(plot: Plot, tmp_path: Path) -> None:
    """The newest release comes back from the broker, devices follow what comes after it, and every sum is exact."""
    started = time.monotonic()
    (bed,) = plot.beds
    bed.released(2, 60)
    archive = tmp_path / "backup.tar"
    command(plot, "backup", "-o", str(archive))
    saved = bed.look()
    bed.released(saved + 2, 60)
    away = plot.devices[0].daemon
    away.kill()
    query = "SELECT device FROM contributions WHERE origin_round = (SELECT MAX(round) FROM rounds) ORDER BY device"
    others = [(device.name,) for device in plot.devices[1:]]
    until(lambda: plot.query(query) == others or None, "a round that waits for one device", 60)
    newest = bed.look()
    plot.aggregator.kill()
    shutil.rmtree(plot.state)
    command(plot, "restore", str(archive))
    before = {device.name: len(device.accepted()) for device in plot.devices}
    plot.aggregator.start()
    away.start()

    # It skips 1000 releases and half of the rounds that are left, then ends the plan.
    finished = until(
        lambda: next((line for line in plot.aggregator.read() if line["event"] == "task.finished"), None),
        "the end of the plan",
        120,
    )
    assert (finished["why"], finished["rounds"]) == ("rounds", PLAN.rounds)
    recovered = next(line for line in plot.aggregator.read() if line["event"] == "task.recovered")
    assert not recovered["needs_manifest"]
    assert recovered["release"] == newest + 1000, "the newest release was on the broker, not in the backup"
    for device in plot.devices:
        while max(device.accepted(), default=0) < PLAN.rounds:
            assert time.monotonic() < started + 120, f"{device.name} never read its last receipt"
            time.sleep(0.05)
        assert len(device.accepted()) > before[device.name]
    plot.end()

    last, rounds = max(bed.seen), PLAN.rounds - recovered["round"]
    assert last == newest + 1000 + rounds
    # Each device has its cell: a third of each round in which it counted, and it counted in all of them.
    for release in sorted(bed.seen):
        worked = release if release <= newest else newest + release - (newest + 1000)
        assert np.abs(bed.seen[release][:DEVICES] - worked / DEVICES).max() < 1e-4, f"release {release}"
        assert not bed.seen[release][DEVICES:].any()
    counted = plot.query(
        f"SELECT COUNT(*) FROM contributions WHERE task = '{TASK}' AND outcome = 'accepted' "
        f"AND origin_round > {recovered['round']}"
    )
    assert counted == [(DEVICES * rounds,)]
    note(f"backup at release {saved}, lost at {newest}, ended at {last}: {time.monotonic() - started:.0f} s")
