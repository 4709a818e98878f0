"""What a round costs beside the training: real agents with real, warm trainers, one broker, one aggregator."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import meters
from bench.fleet import Fleet, Log
from bench.report import Figure, Goal

WARM = 3
"""Rounds before the first that counts: trainers start, files are read for the first time."""

Cpu = dict[str, list[float]]


def measure(root: Path, devices: int, rounds: int, idle: float) -> list[Figure]:
    """Figures of `rounds` rounds with `devices` agents; before them, those of the idle agents over `idle` seconds."""
    total = WARM + rounds + 1
    with Fleet(root, devices, total) as fleet:
        fleet.start()
        fleet.start_agents()
        release = fleet.build()
        figures = _idle(fleet, idle) if idle else []
        moved = _moved(fleet)
        log = fleet.log()
        fleet.publish(release)
        _until_closed(fleet, log, WARM, 120)
        cpu, busy, began = _cpu(fleet), meters.machine_busy(), time.monotonic()
        _until_closed(fleet, log, WARM + rounds, 60 + 10 * rounds)
        spent, wall = _since(cpu, _cpu(fleet)), time.monotonic() - began
        others = meters.machine_busy() - busy - sum(map(sum, spent.values()))
        fleet.until("the task has finished", lambda: _count(log, "task.finished") > 0, 60)
        received, sent = _settled(fleet, moved)
        group = f"Round, {devices} devices"
        figures += _round_figures(group, devices, log, rounds)
        for name, values in spent.items():
            goals = {"aggregator": Goal("<=", 0.3) if devices == 10 else None}
            figures.append(
                Figure(group, f"CPU a round: {name}", "s", tuple(v / rounds for v in values), goals.get(name))
            )
        clients = tuple((a + t) / rounds for a, t in zip(spent["agent"], spent["trainer"], strict=True))
        figures.append(Figure(group, "CPU a round: client (agent + trainer)", "s", clients, Goal("<=", 0.05)))
        every = sum(map(sum, spent.values()))
        share = 100 / wall / _cores()
        figures.append(Figure(group, "share of the machine's CPU: ours", "%", (share * every,)))
        figures.append(Figure(group, "share of the machine's CPU: anything else", "%", (share * others,)))
        uplink = tuple(one / total / 1e6 for one in sent)
        figures.append(Figure(group, "bytes up a client and round", "MB", uplink, Goal("<=", 0.32)))
        # One release more than rounds goes down: the publisher's.
        figures.append(
            Figure(group, "bytes down a client and release", "MB", tuple(one / (total + 1) / 1e6 for one in received))
        )
        figures += _memory(group, fleet)
        figures += _phases(f"Where a round goes, {devices} devices", fleet, log)
    return figures


def _idle(fleet: Fleet, seconds: float) -> list[Figure]:
    group, pids = "Idle agent", [agent.pid for agent in fleet.agents]
    time.sleep(3)  # start-up is over
    cpu, woken = [meters.cpu_exact(pid) for pid in pids], [meters.wake_ups(pid) for pid in pids]
    moved = _moved(fleet)
    began = time.monotonic()
    time.sleep(seconds)
    minutes = (time.monotonic() - began) / 60
    # The question for the bytes moved wakes an agent too, so it comes after the readings.
    spent = tuple((meters.cpu_exact(pid) - before) / minutes for pid, before in zip(pids, cpu, strict=True))
    wakes = tuple((meters.wake_ups(pid) - before) / minutes for pid, before in zip(pids, woken, strict=True))
    traffic = tuple((sum(b) - sum(a)) / minutes for a, b in zip(moved, _moved(fleet), strict=True))
    memory = tuple(meters.resident(pid) for pid in pids)
    return [
        Figure(group, "resident memory, before any trainer", "MB", memory, Goal("<=", 45)),
        Figure(group, "CPU a minute", "s", spent),
        Figure(group, "wake-ups a minute (all threads)", "", wakes),
        Figure(group, "bytes a minute, both ways", "B", traffic),
    ]


def _round_figures(group: str, devices: int, log: Log, rounds: int) -> list[Figure]:
    events = log.read()
    opened = {each["round"]: each["at"] for each in events if each["event"] == "round.opened"}
    closed = {each["round"]: each["at"] for each in events if each["event"] == "round.closed"}
    released = {each["release"]: each["at"] for each in events if each["event"] == "release.published"}
    counted = range(WARM + 1, WARM + rounds + 1)
    goal = Goal("<=", 0.5) if devices == 10 else None
    cycle = tuple(released[number] - released[number - 1] for number in counted)
    inside = tuple(closed[number] - opened[number] for number in counted)
    return [
        Figure(group, "release to release", "s", cycle, goal),
        Figure(group, "round.opened to round.closed", "s", inside),
    ]


def _phases(group: str, fleet: Fleet, log: Log) -> list[Figure]:
    """Median over rounds, of the device that was last at each step: seconds since the round was opened."""
    aggregator = log.read()
    opened = {each["round"]: each["at"] for each in aggregator if each["event"] == "round.opened"}
    agents = [fleet.log(f"dev-{device}").read() for device in range(fleet.devices)]
    steps: list[tuple[str, dict[int, list[float]]]] = []
    for name, key in (
        ("release.accepted", "release"),
        ("training.started", "round"),
        ("training.finished", "round"),
        ("update.sent", "round"),
    ):
        shift = 1 if key == "release" else 0  # round n trains on release n - 1
        steps.append((name, _times([each for events in agents for each in events], name, key, shift)))
    steps.append(("update.accepted", _times(aggregator, "update.accepted", "round", 0)))
    steps.append(("round.closed", _times(aggregator, "round.closed", "round", 0)))
    steps.append(("release.published", _times(aggregator, "release.published", "release", 0)))
    figures = []
    for name, times in steps:
        numbers = [number for number in opened if number > WARM and number in times]
        figures.append(Figure(group, f"until the first {name}", "s", tuple(min(times[n]) - opened[n] for n in numbers)))
        if name in ("round.closed", "release.published"):
            continue
        figures.append(Figure(group, f"until the last {name}", "s", tuple(max(times[n]) - opened[n] for n in numbers)))
    return figures


def _times(events: Sequence[dict[str, Any]], name: str, key: str, shift: int) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for each in events:
        if each["event"] == name:
            found.setdefault(each[key] + shift, []).append(each["at"])
    return found


def _memory(group: str, fleet: Fleet) -> list[Figure]:
    assert fleet.aggregator is not None
    server, peak = meters.resident(fleet.aggregator.pid), meters.resident_peak(fleet.aggregator.pid)
    return [
        Figure(group, "resident: agent", "MB", tuple(meters.resident(agent.pid) for agent in fleet.agents)),
        Figure(group, "resident: trainer", "MB", tuple(meters.resident(pid) for pid in fleet.trainers())),
        Figure(group, "resident: aggregator", "MB", (server,), Goal("<=", 108)),
        Figure(group, "resident, peak: aggregator", "MB", (peak,), Goal("<=", 108)),
    ]


def _cpu(fleet: Fleet) -> Cpu:
    assert fleet.aggregator is not None and fleet.broker.pid is not None
    return {
        "aggregator": [meters.cpu_seconds(fleet.aggregator.pid)],
        "broker": [meters.cpu_seconds(fleet.broker.pid)],
        "agent": [meters.cpu_seconds(agent.pid) for agent in fleet.agents],
        "trainer": [meters.cpu_seconds(pid) for pid in fleet.trainers()],
    }


def _since(before: Cpu, after: Cpu) -> Cpu:
    return {name: [b - a for a, b in zip(before[name], after[name], strict=True)] for name in before}


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _moved(fleet: Fleet) -> list[tuple[int, int]]:
    links = [fleet.ask(device)["link"] for device in range(fleet.devices)]
    return [(link["bytes_received"], link["bytes_sent"]) for link in links]


def _settled(fleet: Fleet, before: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """(received, sent) since `before`, by device, once nothing moves any more."""
    now = _moved(fleet)
    while True:
        time.sleep(0.5)
        again = _moved(fleet)
        if again == now:
            break
        now = again
    pairs = list(zip(before, now, strict=True))
    return [b[0] - a[0] for a, b in pairs], [b[1] - a[1] for a, b in pairs]


def _count(log: Log, event: str) -> int:
    return sum(each["event"] == event for each in log.read())


def _until_closed(fleet: Fleet, log: Log, number: int, seconds: float) -> None:
    def closed() -> bool:
        return any(each["event"] == "round.closed" and each["round"] >= number for each in log.read())

    fleet.until(f"round {number} is closed", closed, seconds)
