"""A running aggregator with a broker and light devices, and what a test may see of it from outside."""

import json
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import structs

from shared import signing, trust, wire
from shared.messages import (
    DeviceStatus,
    Outcome,
    Plan,
    Receipt,
    Release,
    ReleaseMessage,
    Role,
    RoundOffer,
    Signed,
    TaskManifest,
)
from shared.opset import OPSET_VERSION
from shared.selection import draw
from tests.broker.broker import Fleet, Peer
from tests.hostile import records
from tests.hostile.daemon import Daemon, Line, until
from tests.hostile.records import MODEL, Device, Model, Update

FENCE = "zz-fence"


def status(eligible: bool = True, **changes: Any) -> DeviceStatus:
    """A device's good word about itself."""
    plain = DeviceStatus(
        v=1,
        session=b"12345678",
        online=True,
        version="0",
        opsets=[OPSET_VERSION],
        eligible=eligible,
        obstacles=[],
        datasets=["d"],
        sent=int(time.time()),
    )
    return structs.replace(plain, **changes)


@dataclass(frozen=True)
class Snapshot:
    """Every row of the database, every file and every retained topic."""

    rows: dict[str, list[str]]
    files: list[Path]
    retained: dict[str, bytes]


class Site:
    """The fleet, its aggregator, and peers that stay connected."""

    def __init__(self, fleet: Fleet, clock: Path | None = None) -> None:
        self.fleet, self.keys = fleet, records.load_keys(fleet)
        records.retire(fleet, self.keys)
        self.daemon = Daemon("aggregator", fleet.folder / "aggregator" / "aggregator.toml", clock)
        self._state = fleet.folder / "aggregator" / "state"
        self.operator = Peer(fleet, fleet.operator)
        self._fence = Peer(fleet, fleet.device(FENCE))
        self._watcher = Peer(fleet, fleet.device("watcher"))
        self._good = self._fences = 0
        self.manifests: dict[str, TaskManifest] = {}
        self.messages: dict[str, ReleaseMessage] = {}

    def begin(self) -> None:
        """Start the aggregator, with the tasks that the cases speak of.

        main: one round that takes any number of updates. picky: wants one of two devices. short: a release each update.
        """
        shutil.rmtree(self._state, ignore_errors=True)
        (self.fleet.folder / "aggregator" / "deny.txt").write_text("denied\n")
        self.daemon.start()
        self.daemon.wait("link.up")
        self.fence()
        for device in ("live-1", "live-2"):
            self.online(device)
        self.task("main")
        self.task("picky", plan=Plan(goal=1, min_updates=1, rounds=9, deadline=3600, over_select=1.0))
        self.task("short", plan=Plan(goal=1, min_updates=1, rounds=9, deadline=3600, over_select=9.0))

    # -- doing ---------------------------------------------------------------------------------------------------

    def publish(self, payload: bytes, *, retain: bool = False) -> None:
        """Put something on models/release as the operator."""
        assert self.operator.publish("models/release", payload, retain) < 128

    def task(self, name: str, version: int = 5, model: Model = MODEL, **changes: Any) -> RoundOffer:
        """A task in the fleet, with its first round open."""
        described = records.manifest(self.keys, name, version, model, **changes)
        message = records.release(self.keys, described, model)
        self.manifests[name], self.messages[name] = described, message
        self.publish(wire.pack(message))
        self.daemon.wait("round.opened", task=name, round=1)
        return self.offer(name)

    def online(self, device: str, **changes: Any) -> None:
        """Let a device say that it would train."""
        with Peer(self.fleet, self.fleet.device(device)) as peer:
            assert peer.publish(f"fl/dev/{device}/status", wire.pack(status(**changes)), retain=True) < 128
            peer.bye()

    def send(self, device: Device, update: Update, topic: str | None = None) -> list[Receipt]:
        """Send an update and wait for its receipt."""
        with Peer(self.fleet, self.fleet.device(device.name)) as peer:
            assert peer.subscribe(f"fl/dev/{device.name}/cmd/receipt") < 128
            where = f"fl/up/0/{device.name}/{update.name}/head" if topic is None else topic
            assert peer.publish(where, update.payload) < 128
            return until(lambda: [self.opened(data) for _, data in peer.fence()] or None, "a receipt")

    def whisper(self, device: str, topic: str, payload: bytes) -> None:
        """Publish something as a device, below its own name."""
        with Peer(self.fleet, self.fleet.device(device)) as peer:
            assert peer.publish(topic, payload) < 128, f"the broker keeps {device} from {topic}"
            peer.bye()

    def fresh(self) -> Device:
        """A device that never did anything."""
        self._good += 1
        return records.load_device(self.fleet, f"good-{self._good}")

    def accepts(self, task: str = "main") -> None:
        """The aggregator still takes a correct update."""
        device = self.fresh()
        update = records.update(device, self.offer(task))
        (answer,) = self.send(device, update)
        assert (answer.outcome, answer.device) == (Outcome.ACCEPTED, device.name)
        assert answer.head == bytes.fromhex(update.name) + answer.head[16:]

    # -- seeing --------------------------------------------------------------------------------------------------

    def opened(self, data: bytes) -> Receipt:
        """A receipt, its signature verified as a device does."""
        signed = wire.unpack(data, Signed)
        return signing.verify(signed, Receipt, Role.AGGREGATOR, [signing.public_bytes(self.keys.aggregator)])

    def retained(self) -> dict[str, bytes]:
        """All that the broker keeps of models, as a device sees it, once it is what the aggregator has stored."""
        newest = "SELECT task, offer, MAX(manifest_version * 1000000 + round) FROM rounds GROUP BY task"
        released = "SELECT task, signed, MAX(manifest_version * 1000000 + number) FROM releases GROUP BY task"

        def found() -> dict[str, bytes] | None:
            offers = {f"models/{task}/round": offer for task, offer, _ in self._query(newest)}
            releases = {f"models/{task}/release": signed for task, signed, _ in self._query(released)}
            self._watcher.fence()
            # Asking again brings what is retained again.
            assert self._watcher.subscribe("models/#", 0) < 128
            kept = dict(self._watcher.fence())
            if not all(signed in kept.get(topic, b"") for topic, signed in releases.items()):
                return None
            return kept if all(kept.get(topic) == offer for topic, offer in offers.items()) else None

        return until(found, "the newest releases and offers on the broker")

    def _query(self, text: str) -> list[Any]:
        with sqlite3.connect(f"file:{self._state}/aggregator.db?mode=ro", uri=True) as database:
            return list(database.execute(text))

    def offer(self, task: str) -> RoundOffer:
        """The newest offer of a task, believed as a device believes it."""
        signed = wire.unpack(self.retained()[f"models/{task}/round"], Signed)
        return trust.offer(signed, self.messages[task].manifest, self.manifests[task])

    def newest(self, task: str) -> Release:
        """The newest release of a task, as retained."""
        message = wire.unpack(self.retained()[f"models/{task}/release"], ReleaseMessage)
        return wire.unpack(message.release.payload, Release)

    def provoke(self, send: Callable[[], object], silent: bool = False) -> list[Line]:
        """All that the aggregator logs because of what `send` does; waits for a first line unless `silent`."""
        self.fence()
        start = len(self.daemon.lines)
        send()
        if not silent:
            until(lambda: self.daemon.read()[start:] or None, "any word of the aggregator")
        self.fence()
        return [line for line in self.daemon.lines[start:] if FENCE not in line.get("topic", "")]

    def fence(self) -> None:
        """Return when the aggregator is there and all that was sent before has been dealt with and kept."""
        for _ in range(2):  # what follows from the first one's batch is done before the next batch begins
            self._fences += 1
            start, topic = len(self.daemon.lines), f"fl/up/0/{FENCE}/{self._fences}"

            def heard(topic: str = topic) -> bool | None:
                assert self.daemon.pid
                # Its link is up before the broker has granted what it asks for; 16 says that nobody listens yet.
                return self._fence.publish(topic, b"") == 0 or None

            until(heard, "a subscriber")
            self.daemon.wait("message.refused", start, topic=topic)

    def audit(self) -> None:
        """The counters that `aggregator status` shows are those of the log: no line without its count, nor the reverse.

        The file lags a second behind, so this is asked once and not after each case.
        """
        self.fence()
        lines = self.daemon.read()
        lines = lines[max(number for number, line in enumerate(lines) if line["event"] == "daemon.started") :]
        refused = Counter(each["reason"] for each in lines if each["event"] in ("message.refused", "update.rejected"))
        events = Counter(line["event"] for line in lines)

        def shown() -> Counter[str] | None:
            found: dict[str, Any] = json.loads((self._state / "status.json").read_text())
            return Counter(found["counts"]) if Counter(found["refused"]) == refused else None

        counts = until(shown, f"a status file that counts {refused}")
        assert counts["updates_accepted"] == events["update.accepted"]
        assert counts["releases_adopted"] == events["task.adopted"]
        assert counts["rounds_released"] == events["round.closed"]
        assert counts["publish_refused"] == 0

    def snapshot(self) -> "Snapshot":
        """All that lasts, once everything that was sent before has been dealt with."""
        self.fence()
        tables = [name for (name,) in self._query("SELECT name FROM sqlite_master WHERE type='table'")]
        rows = {table: sorted(map(repr, self._query(f'SELECT * FROM "{table}"'))) for table in tables}
        files = sorted(path for folder in ("keys", "blobs") for path in (self._state / folder).iterdir())
        return Snapshot(rows, files, self.retained())

    def not_selected(self, task: str, *names: str) -> str:
        """One of these devices that the task's open round does not want."""
        offered, version = self.offer(task), self.manifests[task].version
        left = [name for name in names if draw(task, version, offered.round, name) >= offered.participation]
        assert left, "the round wants everybody"
        return left[0]
