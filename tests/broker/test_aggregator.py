"""`aggregator run` over a real broker with light devices: rounds end as the plan says, and kill -9 changes nothing.

Device i contributes the unit vector e_i: after any crash each cell of the sum must be what its device sent, once.
"""

import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from shared import tensors, wire
from shared.messages import (
    FedAvg,
    OfferState,
    Outcome,
    Plan,
    Release,
    ReleaseMessage,
    RoundOffer,
    Signed,
    UpdateContext,
    UpdateHead,
)
from tests.broker.broker import Fleet, Peer
from tests.hostile import records
from tests.hostile.daemon import until
from tests.hostile.records import DIMENSION, LAYOUT, Device, Update
from tests.hostile.site import FENCE, Site

NAMES = [f"light-{number}" for number in range(8)]
UNIFORM = FedAvg(weights="uniform")


def plan(goal: int, **changes: Any) -> Plan:
    """Everybody is selected, and only the goal closes a round."""
    return Plan(**{"goal": goal, "min_updates": 1, "rounds": 100, "deadline": 3600, "over_select": 100.0, **changes})


class Yard(Site):
    """A site whose aggregator may be killed and started again."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(fleet)
        self.state = fleet.folder / "aggregator" / "state"
        self.config = fleet.folder / "aggregator" / "aggregator.toml"
        self.devices = [records.load_device(fleet, name) for name in NAMES]

    def start(self) -> int:
        """Start the aggregator; returns how many lines its log had before."""
        since = len(self.daemon.read())
        self.daemon.start()
        self.daemon.wait("link.up", since)
        self.fence()
        return since

    def kill(self) -> None:
        """End it as a power cut would."""
        self.daemon.kill()

    def reconnect(self) -> None:
        """The site's own peers come back after the broker did."""
        self.operator = Peer(self.fleet, self.fleet.operator)
        self._fence = Peer(self.fleet, self.fleet.device(FENCE))
        self._watcher = Peer(self.fleet, self.fleet.device("watcher"))

    def everybody(self, **changes: Any) -> None:
        """All devices say that they would train."""
        for name in NAMES:
            self.online(name, **changes)

    def unit(self, number: int, offer: RoundOffer, **changes: Any) -> Update:
        """Device `number`'s unit vector as an update."""
        delta = np.zeros(DIMENSION, "<f4")
        delta[number] = 1.0
        return records.update(self.devices[number], offer, delta=delta.tobytes(), **changes)

    def give(self, *numbers: int, task: str = "main") -> list[Update]:
        """Let these devices contribute, one after the other; each is accepted."""
        offer = self.offer(task)
        made = [self.unit(number, offer) for number in numbers]
        for number, update in zip(numbers, made, strict=True):
            assert self.outcome(self.devices[number], update) is Outcome.ACCEPTED
        return made

    def outcome(self, device: Device, update: Update) -> Outcome:
        """What the aggregator says to an update."""
        (answer,) = self.send(device, update)
        return answer.outcome

    def released(self, number: int, task: str = "main") -> Release:
        """The task's newest release, once it is this one."""

        def found() -> Release | None:
            newest = self.newest(task)
            return newest if newest.number >= number else None

        newest = until(found, f"release {number} of {task}")
        assert newest.number == number
        return newest

    def model(self, task: str = "main") -> list[float]:
        """The newest weights as retained."""
        message = wire.unpack(self.retained()[f"models/{task}/release"], ReleaseMessage)
        assert message.weights is not None
        found = tensors.load(message.weights, LAYOUT)["weight"]
        return [float(value) for value in found.ravel()]

    def is_open(self, number: int, task: str = "main") -> bool:
        """Whether the newest offer is this round's and open."""
        offer = self.offer(task)
        return (offer.round, offer.state) == (number, OfferState.OPEN)

    def rows(self, query: str) -> list[Any]:
        """What the database says."""
        with sqlite3.connect(f"file:{self.state}/aggregator.db?mode=ro", uri=True) as database:
            return database.execute(query).fetchall()

    def key(self, task: str, number: int) -> bytes | None:
        """The private key of a round of manifest 5, while there is one."""
        path = self.state / "keys" / f"{task}.5.{number}"
        return path.read_bytes() if path.exists() else None


@pytest.fixture
def yard(fleet: Fleet) -> Iterator[Yard]:
    """An aggregator without a past, on an empty broker, with eight devices online; it must end cleanly."""
    fleet.fresh_broker()
    shutil.rmtree(fleet.folder / "aggregator" / "state", ignore_errors=True)
    (fleet.folder / "aggregator" / "aggregator.log").write_bytes(b"")
    made = Yard(fleet)
    with made.daemon:
        made.start()
        made.everybody()
        yield made
        assert made.daemon.stop() == 0
        made.daemon.read()


def cells(*numbers: int, value: float = 1.0) -> list[float]:
    """A model in which these cells have this value."""
    return [value if number in numbers else 0.0 for number in range(DIMENSION)]


# -- how a round ends --------------------------------------------------------------------------------------------


def test_by_its_goal(yard: Yard) -> None:
    """The update that reaches the goal closes the round: offer closed, release one higher, the next round open."""
    yard.task("main", plan=plan(4), algorithm=UNIFORM)
    key = yard.key("main", 1)
    yard.give(0, 3, 5, 7)
    release = yard.released(1)
    assert yard.model() == cells(0, 3, 5, 7, value=0.25)
    assert release.metrics == {"accuracy": 0.5, "loss": 1.0}
    yard.daemon.wait("round.opened", task="main", round=2)
    offer = yard.offer("main")
    assert (offer.round, offer.state) == (2, OfferState.OPEN)
    assert key is not None and yard.key("main", 1) is None  # forward secrecy
    yard.give(1, 2, 4, 6)
    yard.released(2)
    assert yard.model() == cells(*range(8), value=0.25)


def test_weighted_by_examples(yard: Yard) -> None:
    """Each update weighs as much as its examples, and no more than the cap."""
    yard.task("main", plan=plan(3), algorithm=FedAvg(cap=6))
    offer = yard.offer("main")
    for number, examples in ((0, 1), (1, 9), (2, 1)):  # 1, 6 and 1 of 8
        update = yard.unit(number, offer, report=records.body(examples=examples))
        assert yard.outcome(yard.devices[number], update) is Outcome.ACCEPTED
    yard.released(1)
    assert yard.model()[:4] == [0.125, 0.75, 0.125, 0.0]


def test_by_its_deadline(yard: Yard) -> None:
    """At the deadline the minimum is enough; below it the round is extended, keeps what it has, and still ends."""
    yard.task("main", plan=plan(100, min_updates=2, deadline=1, max_extension=2), algorithm=UNIFORM)
    yard.give(1)
    extended = yard.daemon.wait("round.extended", task="main", round=1)
    offer = yard.offer("main")
    assert (offer.round, offer.state, extended["updates"]) == (1, OfferState.OPEN, 1)
    assert offer.sequence >= 1
    yard.give(6)
    yard.released(1)
    assert yard.model() == cells(1, 6, value=0.5)
    assert yard.daemon.wait("round.closed", task="main", round=1)["updates"] == 2


def test_the_last_round(yard: Yard) -> None:
    """After the plan's rounds the task is finished: the offer says so, and a restart opens nothing."""
    yard.task("main", plan=plan(1, rounds=2), algorithm=UNIFORM)
    yard.give(0)
    yard.daemon.wait("round.opened", task="main", round=2)
    yard.give(0)
    yard.daemon.wait("task.finished", task="main")
    assert (yard.offer("main").state, yard.newest("main").number) == (OfferState.FINISHED, 2)
    yard.kill()
    since = yard.start()
    yard.fence()
    assert [line for line in yard.daemon.read()[since:] if line["event"] == "round.opened"] == []
    assert yard.offer("main").state is OfferState.FINISHED


def test_two_tasks(yard: Yard) -> None:
    """Tasks do not know of each other: one's round ends while the other's goes on."""
    yard.task("main", plan=plan(2), algorithm=UNIFORM)
    yard.task("other", plan=plan(1), algorithm=UNIFORM)
    yard.give(0)
    yard.give(1, task="other")
    yard.released(1, "other")
    yard.give(2)
    yard.released(1)
    assert (yard.model(), yard.model("other")) == (cells(0, 2, value=0.5), cells(1))


# -- crashes -----------------------------------------------------------------------------------------------------


def test_killed_with_an_open_round(yard: Yard) -> None:
    """The same round goes on: same offer and key, each update counted once, and the bits of an unbroken run."""
    odd = [records.values(value=value) for value in (0.1, 0.7, -0.3, 1e-3, 0.017)]
    for task in ("calm", "main"):
        yard.task(task, plan=plan(5))

    def send(task: str, number: int) -> Outcome:
        offer = yard.offer(task)
        report = records.body(examples=3 + number)
        return yard.outcome(
            yard.devices[number], records.update(yard.devices[number], offer, delta=odd[number], report=report)
        )

    for number in range(5):
        assert send("calm", number) is Outcome.ACCEPTED
    calm = yard.released(1, "calm").weights.sha256

    assert [send("main", number) for number in range(2)] == [Outcome.ACCEPTED] * 2
    before, key = yard.retained(), yard.key("main", 1)
    for survivor in (2, 3):
        yard.kill()
        yard.start()
        yard.fence()
        assert yard.retained() == before
        assert key is not None and yard.key("main", 1) == key
        # Sent again, as a device does that heard no receipt; and a second update of the same device.
        assert send("main", 0) is Outcome.DUPLICATE  # sealed anew, so another head
        assert send("main", survivor) is Outcome.ACCEPTED
    assert send("main", 4) is Outcome.ACCEPTED
    assert yard.released(1).weights.sha256 == calm
    yard.daemon.wait("fold.rebuilt", task="main", round=1, updates=5)
    assert [each for each in yard.daemon.lines if each["event"] == "fold.rebuilt" and each["task"] == "calm"] == []


def test_the_identical_head_after_a_crash(yard: Yard) -> None:
    """It gets its first answer again, before and after the round's end, and counts once."""
    yard.task("main", plan=plan(2), algorithm=UNIFORM)
    (first,) = yard.give(0)
    yard.kill()
    yard.start()
    assert yard.outcome(yard.devices[0], first) is Outcome.ACCEPTED
    yard.give(1)
    yard.released(1)
    assert yard.model() == cells(0, 1, value=0.5)
    yard.kill()
    yard.start()
    assert yard.outcome(yard.devices[0], first) is Outcome.ACCEPTED
    late = yard.unit(2, yard.offer("main"), context={"round": 1})
    assert yard.outcome(yard.devices[2], late) is Outcome.LATE
    assert yard.rows("SELECT device, COUNT(*) FROM contributions GROUP BY device") == [("light-0", 1), ("light-1", 1)]


def test_killed_while_updates_arrive(yard: Yard) -> None:
    """What was not acknowledged comes again from the broker: killed anywhere in a burst, all count, each once."""
    yard.task("main", plan=plan(8), algorithm=UNIFORM)
    dice = random.Random(5)
    for number in range(1, 5):
        offer = yard.offer("main")
        burst = [yard.unit(each, offer) for each in range(8)]
        killer = threading.Timer(dice.uniform(0.0, 0.06), yard.kill)
        killer.start()
        post(yard, burst)
        killer.join()
        yard.start()
        yard.released(number)
        assert yard.model() == cells(*range(8), value=number / 8)
        until(lambda number=number: yard.is_open(number + 1) or None, "the next round")  # type: ignore[misc]
    assert yard.rows("SELECT COUNT(*), COUNT(DISTINCT device || origin_round) FROM contributions") == [(32, 32)]


def test_killed_between_closing_and_publication(yard: Yard) -> None:
    """At whatever instant: one release of each number, made of exactly its round's updates, and it is published."""
    yard.task("main", plan=plan(1), algorithm=UNIFORM)
    dice, end, number = random.Random(11), time.monotonic() + 8.0, 0
    while time.monotonic() < end or number < 3:
        number += 1
        offer = yard.offer("main")
        assert offer.round == number
        post(yard, [yard.unit(number % 8, offer)])
        time.sleep(dice.uniform(0.0, 0.03))  # the instant is what the test is about
        yard.kill()
        yard.start()
        newest = yard.released(number)
        # A later round opens, as soon as the devices' retained words have come back. Not its line in the log is waited
        # for: the kill may have come just before that.
        until(lambda number=number: yard.is_open(number + 1) or None, "the next round")  # type: ignore[misc]
        assert newest.parent is not None
    expected = [float(sum(each % 8 == cell for each in range(1, number + 1))) for cell in range(DIMENSION)]
    assert yard.model() == expected
    assert yard.rows("SELECT number FROM releases ORDER BY number") == [(each,) for each in range(number + 1)]
    states = yard.rows("SELECT round, state FROM rounds ORDER BY round")
    assert states == [(each, "released") for each in range(1, number + 1)] + [(number + 1, "open")]
    releases = [
        wire.unpack(wire.unpack(signed, Signed).payload, Release)
        for (signed,) in yard.rows("SELECT signed FROM releases ORDER BY number")
    ]
    assert [each.number for each in releases] == list(range(number + 1))
    # Nothing is left of what is over: two graphs, the weights to go back to; one key.
    assert len([path for path in (yard.state / "blobs").iterdir() if not path.suffix]) == 2 + min(number + 1, 10)
    assert sum(path.stat().st_size for path in (yard.state / "blobs").glob("*.segment")) < 100
    assert [path.name for path in (yard.state / "keys").iterdir()] == [f"main.5.{number + 1}"]


def test_an_empty_broker(yard: Yard) -> None:
    """A broker that lost everything gets releases and offers back, byte for byte; and so does one found at a start."""
    yard.task("main", plan=plan(2), algorithm=UNIFORM)
    yard.task("other", plan=plan(1, rounds=1), algorithm=UNIFORM)
    yard.give(0)
    yard.give(0, task="other")
    yard.daemon.wait("task.finished", task="other")
    wanted = {topic: data for topic, data in yard.retained().items() if topic != "models/release"}
    assert len(wanted) == 4

    for stopped in (False, True):
        if stopped:
            yard.kill()
        since = len(yard.daemon.read())
        yard.fleet.fresh_broker()
        yard.reconnect()
        if stopped:
            yard.start()
        yard.daemon.wait("link.up", since, session_present=False)
        yard.daemon.wait("release.published", since, task="other")
        yard.fence()
        assert yard.retained() == wanted
    yard.give(1)
    yard.everybody()
    yard.released(1)
    assert yard.model() == cells(0, 1, value=0.5)


def test_a_broker_killed(yard: Yard) -> None:
    """The aggregator comes back by itself, and an open round goes on."""
    yard.task("main", plan=plan(2), algorithm=UNIFORM)
    yard.give(0)
    since = len(yard.daemon.read())
    yard.fleet.broker.kill()
    yard.daemon.wait("link.down", since)
    yard.fleet.broker.start()
    yard.daemon.wait("link.up", since)
    yard.reconnect()
    yard.everybody()
    yard.fence()
    yard.give(1)
    yard.released(1)
    assert yard.model() == cells(0, 1, value=0.5)
    downs = [line for line in yard.daemon.lines[since:] if line["event"] == "link.down"]
    assert len({line["cause"] for line in downs}) == len(downs) <= 2  # cut, then nobody there: each told once


def test_weights_in_chunks(yard: Yard) -> None:
    """Chunks are there before the message names them; a broker that lost them gets all again; a kill costs nothing."""
    drop_in = yard.config.with_name("aggregator.toml.d")
    drop_in.mkdir()
    (drop_in / "large.toml").write_text("[limits]\ninline_max = 0\n")
    try:
        yard.kill()
        yard.start()
        yard.everybody(v=2)
        yard.task("main", plan=plan(2), algorithm=UNIFORM)
        yard.give(0, 1)
        release = yard.released(1)
        assert (release.v, len(release.weights.chunks)) == (2, 1)

        def kept() -> list[bytes]:
            with Peer(yard.fleet, yard.fleet.device("watcher-2")) as peer:
                assert peer.subscribe(f"fl/blob/{release.weights.sha256.hex()}/+") < 128
                return [data for _, data in peer.fence()]

        found = tensors.load(b"".join(kept()), LAYOUT)["weight"]
        assert [float(value) for value in found.ravel()] == cells(0, 1, value=0.5)
        since = len(yard.daemon.read())
        yard.kill()
        yard.fleet.fresh_broker()
        yard.reconnect()
        assert kept() == []
        yard.start()
        yard.daemon.wait("release.published", since, task="main", release=1)
        assert len(kept()) == 1
        yard.everybody(v=2)
        yard.give(2, 3)
        yard.released(2)
    finally:
        shutil.rmtree(drop_in)


def test_a_state_directory_that_went_back_in_time(yard: Yard) -> None:
    """An old copy adopts the newest release from the broker, and goes on with numbers that no device has seen."""
    yard.task("main", plan=plan(2), algorithm=UNIFORM)
    yard.kill()
    old = yard.state.with_name("old")
    shutil.copytree(yard.state, old, ignore=shutil.ignore_patterns("control.sock"))
    yard.start()
    for number in (1, 2, 3):
        yard.give(2 * number, 2 * number - 1)
        yard.released(number)
        until(lambda number=number: yard.is_open(number + 1) or None, "the next round")  # type: ignore[misc]
    model, offer = yard.model(), yard.offer("main")
    assert offer.round == 4
    yard.kill()
    shutil.rmtree(yard.state)
    old.rename(yard.state)
    for key in (yard.state / "keys").iterdir():
        key.unlink()  # no backup has them
    since = yard.start()
    yard.daemon.wait("task.recovered", since, task="main", release=1003)
    opened = yard.daemon.wait("round.opened", since, task="main")
    assert opened["round"] > offer.round
    assert yard.model() == model
    until(lambda: yard.is_open(opened["round"]) or None, "the next round")
    yard.give(0, 7)
    yard.released(1004)


def test_without_any_state(yard: Yard) -> None:
    """A lost disk costs the open round: the task, its newest weights and its numbers come back from the broker."""
    yard.task("main", plan=plan(2), algorithm=UNIFORM)
    yard.give(0, 1)
    yard.released(1)
    yard.kill()
    shutil.rmtree(yard.state)
    since = yard.start()
    yard.daemon.wait("task.adopted", since, task="main", release=1)
    yard.daemon.wait("task.recovered", since, task="main", release=1001)
    assert yard.model() == cells(0, 1, value=0.5)


# -- starting and stopping ---------------------------------------------------------------------------------------


def test_a_second_aggregator(yard: Yard) -> None:
    """Two on one state directory would both sign rounds: the second names it and exits 78; the first works on."""
    command = [sys.executable, "-m", "aggregator.cli", "run", "--config", str(yard.config)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode == 78
    assert "another aggregator runs on this directory" in second.stderr + second.stdout
    assert "Traceback" not in second.stderr + second.stdout
    yard.task("main", plan=plan(1), algorithm=UNIFORM)
    yard.give(0)
    yard.released(1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped(yard: Yard, number: signal.Signals) -> None:
    """A signal ends it in order within seconds: status 0, offline on the broker, no status file, round kept open."""
    yard.task("main", plan=plan(2), algorithm=UNIFORM)
    yard.give(0)
    began = time.monotonic()
    assert yard.daemon.stop(number) == 0
    assert time.monotonic() - began < 5
    assert yard.daemon.read()[-1]["event"] == "daemon.stopped"
    assert not (yard.state / "status.json").exists()
    yard.start()
    yard.give(1)
    yard.released(1)
    assert yard.model() == cells(0, 1, value=0.5)


def test_stopped_while_updates_pour_in(yard: Yard) -> None:
    """A full mailbox keeps nobody from stopping; what was not handled is handled after the next start."""
    yard.task("main", plan=plan(1000), algorithm=UNIFORM)
    offer = yard.offer("main")
    pouring = threading.Event()

    def pour() -> None:
        with Peer(yard.fleet, yard.fleet.device(NAMES[7])) as peer:
            while not pouring.is_set():
                update = yard.unit(7, offer)
                peer.publish(f"fl/up/0/{NAMES[7]}/{update.name}/head", update.payload)

    thread = threading.Thread(target=pour)
    thread.start()
    try:
        yard.daemon.wait("update.rejected", task="main", reason="duplicate")
        began = time.monotonic()
        assert yard.daemon.stop() == 0
        assert time.monotonic() - began < 10
    finally:
        pouring.set()
        thread.join()
    yard.start()
    yard.fence()
    assert yard.rows("SELECT device FROM contributions") == [(NAMES[7],)]


def post(yard: Yard, updates: Sequence[Update]) -> None:
    """Send one update of each device and wait for no receipt: the broker has them, whatever becomes of the rest."""
    for update in updates:
        head = wire.unpack(update.head, UpdateHead)
        name = wire.unpack(head.context, UpdateContext).device
        with Peer(yard.fleet, yard.fleet.device(name)) as peer:
            assert peer.publish(f"fl/up/0/{name}/{update.name}/head", update.payload) < 128
            peer.bye()
