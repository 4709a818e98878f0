"""The aggregator's shell without a broker: what a burst of messages in one batch does to it."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from msgspec import structs

from aggregator import ca, control, service
from aggregator import config as settings
from aggregator.blobs import file_of
from aggregator.quarantine import fingerprint
from aggregator.service import Service
from shared import identity, tensors, wire
from shared.chunks import CHUNK_MIN
from shared.control import ControlRequest
from shared.driver import read_clock
from shared.errors import ConfigError, LinkError, Reason, StorageError
from shared.machine import Instant
from shared.messages import (
    FedAvg,
    Missing,
    OfferState,
    Outcome,
    Plan,
    Receipt,
    Release,
    ReleaseMessage,
    RoundOffer,
    Signed,
    UpdateHead,
    UpdateMessage,
)
from shared.mqtt import LinkUp, Message, Published
from shared.topics import RELEASE, Topics, task_release
from tests.hostile import records
from tests.hostile.records import Device, Update
from tests.hostile.site import status
from tests.unit.full_disk import filled, small_disk

TASK = "points"


def bundle(folder: Path, name: str, now: float) -> Device:
    """A device of the fleet."""
    ca.add_device(folder / "fleet", name, folder / name, now=now, passphrase=None)
    certificate = identity.load_certificate(folder / name / "device.crt").public_bytes(Encoding.DER)
    return Device(name, certificate, identity.load_key(folder / name / "device.key"))


class Bench:
    """A service in a folder, with an open round for `device`; its link never starts, so what it sends waits."""

    def __init__(self, folder: Path) -> None:
        now = read_clock()
        self.folder = folder
        ca.init_fleet(folder / "fleet", "test", ["localhost"], now=now.utc, passphrase=None)
        self.device, self.other = (bundle(folder, name, now.utc) for name in ("sensor-1", "sensor-2"))
        self.deny = folder / "denied"
        loaded = settings.load(folder / "fleet" / "aggregator" / "aggregator.toml", {})
        loaded = structs.replace(
            loaded,
            state=settings.State(directory=folder / "state"),
            trust=structs.replace(loaded.trust, deny=self.deny),
        )
        self.publications: list[tuple[str, bytes]] = []
        self.service = self._start(loaded)
        self.topics = Topics(loaded.broker.prefix)
        self._keys = records.Keys(
            identity.load_signing_key(folder / "fleet" / "publisher" / "publisher.key"),
            identity.load_signing_key(folder / "fleet" / "aggregator" / "signing.key"),
            identity.load_signing_key(folder / "fleet" / "root" / "root.key"),
        )
        self.connect()
        self.adopt(1)

    def _start(self, loaded: settings.AggregatorConfig) -> Service:
        started = Service(loaded, read_clock())
        started._link.publish = self._published  # type: ignore[method-assign]
        return started

    def connect(self) -> None:
        """The link comes up, and what the broker retains arrives."""
        own = self.message(self.topics.aggregator_status(0), self.service._presence(online=True))
        self.batch(LinkUp(False, None), own, self.message(self.topics.device_status("sensor-1"), wire.pack(status())))

    def restart(self) -> None:
        """As after kill -9: nothing but the folder is left."""
        self.service._store.close()
        self.service._lock.close()  # type: ignore[attr-defined]
        self.service = self._start(self.service._config)
        self.connect()

    @property
    def receipts(self) -> list[Receipt]:
        """What the device was told, since this was read last."""
        topic = self.topics.command(self.device.name, "receipt")
        taken, self.publications[:] = list(self.publications), []
        signed = [wire.unpack(payload, Signed) for where, payload in taken if where == topic]
        return [wire.unpack(each.payload, Receipt) for each in signed]

    def limit(self, **changes: Any) -> None:
        """Start again with other limits."""
        config = self.service._config
        self.service._config = structs.replace(config, limits=structs.replace(config.limits, **changes))
        self.restart()

    def _published(self, topic: str, payload: bytes | bytearray, *, qos: int = 1, retain: bool = False) -> int:
        self.publications.append((topic, bytes(payload)))
        return 1

    def adopt(self, version: int, model: records.Model = records.MODEL, **changes: Any) -> None:
        """A publisher's next manifest arrives."""
        message = records.release(self._keys, records.manifest(self._keys, TASK, version, model, **changes), model)
        self.batch(self.message(RELEASE, wire.pack(message)))

    def message(self, topic: str, payload: bytes) -> Message:
        """As the link hands it over."""
        return Message(topic, payload, retain=False, qos=1, mid=1, generation=0)

    def batch(self, *events: object) -> None:
        """Everything at once, as after a moment in which the owner was busy."""
        for event in events:
            self.service.mailbox.post(event)  # type: ignore[arg-type]
        assert self.service._driver.turn(0.0)

    def sent(self, update: Update, by: Device | None = None) -> Message:
        """An update on the topic of its device."""
        return self.message(self.topics.head(0, (by or self.device).name, update.name), update.payload)

    def chunk(self, update: Update, index: int, payload: bytes | None = None, by: Device | None = None) -> Message:
        """A chunk of an update on the topic of its device."""
        topic = self.topics.upload_chunk(0, (by or self.device).name, update.name, index)
        return self.message(topic, update.pieces[index] if payload is None else payload)

    @property
    def asked(self) -> list[list[int]]:
        """The chunks that the device was asked for, since this was read last."""
        topic = self.topics.command(self.device.name, "missing")
        taken, self.publications[:] = list(self.publications), []
        return [wire.unpack(payload, Missing).chunks for where, payload in taken if where == topic]

    @property
    def offer(self) -> RoundOffer:
        """The newest offer."""
        offer = self.service._coordinator.tasks[TASK].offer
        assert offer is not None
        return offer

    @property
    def updates(self) -> int:
        """What the open round has."""
        current = self.service._coordinator.tasks[TASK].round
        assert current is not None
        return len(current.accepted)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A fresh one."""
    return Bench(tmp_path)


def test_our_own_word_waits_for_room(bench: Bench) -> None:
    """Devices hold everything back as long as they read that we are away: that we are there is never dropped."""
    own = bench.topics.aggregator_status(0)

    def full(topic: str, payload: bytes | bytearray, *, qos: int = 1, retain: bool = False) -> int:
        raise LinkError("too much waits")

    bench.publications.clear()
    bench.service._link.publish = full  # type: ignore[method-assign]
    bench.batch(LinkUp(True, None))
    bench.service._link.publish = bench._published  # type: ignore[method-assign]
    bench.batch(Published(7, ""))
    assert [topic for topic, _ in bench.publications].count(own) == 1


@pytest.mark.parametrize("order", ["spoilt first", "spoilt last", "twice", "thrice"])
def test_one_head_with_several_bodies(bench: Bench, order: str) -> None:
    """The body is outside what is signed: a device that sends one head with two bodies at once stops nothing."""
    good = records.update(bench.device, bench.offer)
    assert good.body is not None
    bad = replace(good, body=records.flip(good.body, 3))
    orders = {
        "spoilt first": [bad, good],
        "spoilt last": [good, bad],
        "twice": [good, good],
        "thrice": [bad, good, bad, good],
    }
    bench.batch(*(bench.sent(each) for each in orders[order]))
    assert bench.updates == 1
    assert not bench.service._intake.opened


@pytest.mark.parametrize("spoilt", ["not text", "a folder"])
def test_a_deny_list_that_cannot_be_read_denies_nobody_by_mistake(bench: Bench, spoilt: str) -> None:
    """It blames the file and stops for the operator, instead of failing on the same update after each restart."""
    if spoilt == "a folder":
        bench.deny.mkdir()
    else:
        bench.deny.write_bytes(b"sensor-9\n\xff\xfe\n")
    with pytest.raises(ConfigError) as caught:
        bench.batch(bench.sent(records.update(bench.device, bench.offer)))
    assert (caught.value.path, caught.value.key) == (str(bench.deny), "trust.deny")


# -- each guard of an update, without a broker between -----------------------------------------------------------


def spike(value: float) -> bytes:
    """A delta with one odd value."""
    return np.array([value] + [0.0] * (records.DIMENSION - 1), "<f4").tobytes()


SPOILT: dict[str, tuple[Callable[[Bench], Update], Reason]] = {
    "another signature": (
        lambda b: replace(good := records.update(b.device, b.offer), signature=records.flip(good.signature, -1)),
        Reason.BAD_SIGNATURE,
    ),
    "another device's certificate": (
        lambda b: records.update(replace(b.device, certificate=b.other.certificate), b.offer),
        Reason.WRONG_DEVICE,
    ),
    "another device's name": (
        lambda b: records.update(b.device, b.offer, context={"device": b.other.name}),
        Reason.WRONG_DEVICE,
    ),
    "a dimension that lies": (
        lambda b: records.update(b.device, b.offer, context={"dimension": records.DIMENSION + 1}),
        Reason.WRONG_DIMENSION,
    ),
    "a body far too large": (
        lambda b: records.update(b.device, b.offer, delta=bytes(1 << 20)),
        Reason.TOO_LARGE,
    ),
    "another body": (
        lambda b: replace(good := records.update(b.device, b.offer), body=records.flip(good.body or b"", 9)),
        Reason.WRONG_DIGEST,
    ),
    "an encapsulation of another": (
        lambda b: records.update(b.device, b.offer, spoil=("encapsulation", 3)),
        Reason.SEALED_BADLY,
    ),
    "not a number": (lambda b: records.update(b.device, b.offer, delta=spike(math.nan)), Reason.NOT_FINITE),
    "more than the clip": (
        lambda b: records.update(b.device, b.offer, delta=spike(records.CLIP * 1.01)),
        Reason.NORM,
    ),
    "a metric of nobody": (
        lambda b: records.update(b.device, b.offer, report=records.body(metrics={"fun": 1.0})),
        Reason.METRICS,
    ),
}


OPENED = (Reason.SEALED_BADLY, Reason.NOT_FINITE, Reason.NORM, Reason.METRICS)


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_update_does_not_count(bench: Bench, case: str) -> None:
    """It is refused with its reason and leaves nothing behind; a good one of the same device counts after it.

    But not once a body was opened: that was the device's word for this round, whatever it says later.
    """
    make, reason = SPOILT[case]
    bench.batch(bench.sent(make(bench)))
    assert bench.service._refused == {reason.value: 1}
    assert (bench.updates, bench.service._intake.opened) == (0, {})
    bench.batch(bench.sent(records.update(bench.device, bench.offer)))
    assert bench.updates == (reason not in OPENED)
    assert bench.service._refused[Reason.DUPLICATE.value] == (reason in OPENED)
    bench.batch(bench.sent(records.update(bench.other, bench.offer), bench.other))
    assert bench.updates == 1 + (reason not in OPENED)


def test_an_update_on_the_topic_of_another(bench: Bench) -> None:
    """The topic is what the broker let its owner write: a head that names somebody else is no word of theirs."""
    bench.batch(bench.sent(records.update(bench.device, bench.offer), bench.other))
    assert bench.service._refused == {"wrong_device": 1}
    assert bench.updates == 0


@pytest.mark.parametrize("years", [-40, 3])
def test_a_round_that_was_opened_under_a_wrong_clock(bench: Bench, years: int) -> None:
    """Certificates are judged by the round's opening, or by now: else no device could end that round, for ever."""
    current = bench.service._coordinator.tasks[TASK].round
    assert current is not None
    current.opened += years * 365 * 86_400
    bench.batch(bench.sent(records.update(bench.device, bench.offer)))
    assert (bench.updates, bench.service._refused) == (1, {})


def test_a_denied_device_does_not_count(bench: Bench) -> None:
    """The deny list is stronger than a good certificate and a good signature."""
    bench.deny.write_text("sensor-1\n")
    bench.batch(bench.sent(records.update(bench.device, bench.offer)))
    assert bench.service._refused == {"denied": 1}
    assert bench.updates == 0


def test_a_round_that_is_over_is_recalled(bench: Bench) -> None:
    """The head that counted stays accepted, another one of its device is a duplicate, one of another device late."""
    bench.adopt(2, plan=Plan(goal=1, min_updates=1, rounds=9, deadline=3600))
    offered = bench.offer
    good = records.update(bench.device, offered)
    bench.batch(bench.sent(good))
    assert bench.offer.round == offered.round + 1
    bench.batch(bench.sent(good))
    assert bench.service._refused == {}
    bench.batch(bench.sent(records.update(bench.device, offered, delta=spike(0.5))))
    assert bench.service._refused == {"duplicate": 1}
    bench.batch(bench.sent(records.update(bench.other, offered), bench.other))
    assert bench.service._refused == {"duplicate": 1, "late": 1}
    assert bench.updates == 0


def test_what_counted_under_an_older_manifest_stays_accepted(bench: Bench) -> None:
    """A device whose receipt was lost asks again after a newer manifest came; another head of its is superseded."""
    bench.adopt(2, plan=Plan(goal=1, min_updates=1, rounds=9, deadline=3600))
    offered = bench.offer
    good = records.update(bench.device, offered)
    bench.batch(bench.sent(good))
    bench.adopt(3, plan=Plan(goal=1, min_updates=1, rounds=9, deadline=3600))
    bench.batch(bench.sent(good))
    assert bench.service._refused == {}
    bench.batch(bench.sent(records.update(bench.device, offered, delta=spike(0.5))))
    assert bench.service._refused == {"wrong_manifest": 1}


def test_a_denied_device_is_not_waited_for(bench: Bench) -> None:
    """Its word that it would train counts for nothing: it must not open a round that it can only starve."""
    task = bench.service._coordinator.tasks[TASK]
    said = bench.message(bench.topics.device_status("sensor-1"), wire.pack(status()))
    bench.batch(said)
    assert task.live == {"sensor-1"}
    bench.deny.write_text("sensor-1\n")
    bench.batch(said)
    assert task.live == set()


def test_the_key_of_a_round_that_is_over_is_gone(bench: Bench) -> None:
    """What was sealed to it stays unreadable, whoever gets hold of the machine: the open round's key alone is there."""
    bench.adopt(2, plan=Plan(goal=1, min_updates=1, rounds=9, deadline=3600))
    assert [path.name for path in bench.service._keys.iterdir()] == [f"{TASK}.2.1"]
    bench.batch(bench.sent(records.update(bench.device, bench.offer)))
    assert [path.name for path in bench.service._keys.iterdir()] == [f"{TASK}.2.2"]


def test_a_round_whose_updates_are_damaged_on_disk_is_given_up(bench: Bench) -> None:
    """After a restart the fold is made from the disk; what is damaged there costs its round, not the task."""
    bench.adopt(2, plan=Plan(goal=2, min_updates=1, rounds=5, deadline=60))
    bench.batch(bench.sent(records.update(bench.device, bench.offer)))
    bench.service._intake.folds.clear()
    state = Path(bench.service._config.state.directory)
    (damaged,) = (state / "blobs").glob("*.segment")
    damaged.write_bytes(records.flip(damaged.read_bytes(), -9))
    bench.batch(bench.sent(records.update(bench.other, bench.offer), bench.other))
    assert bench.offer.round == 2
    assert bench.service._coordinator.tasks[TASK].release.number == 0
    assert bench.service._refused[Reason.WRONG_DIGEST.value] == 1


def test_a_rejection_is_remembered(bench: Bench) -> None:
    """The identical head gets its reason again, after a restart and a round's end too; another is a duplicate."""
    bench.adopt(2, plan=Plan(goal=1, min_updates=1, rounds=9, deadline=3600))
    bad = records.update(bench.device, bench.offer, delta=spike(records.CLIP * 2))
    bench.batch(bench.sent(bad))
    (first,) = bench.receipts
    assert (first.outcome, first.reason) == (Outcome.REJECTED, "norm")
    bench.restart()
    good = records.update(bench.device, bench.offer)
    bench.batch(bench.sent(good), bench.sent(bad))
    other, again = bench.receipts
    assert (again, other.outcome, bench.updates) == (first, Outcome.DUPLICATE, 0)
    bench.batch(bench.sent(records.update(bench.other, bench.offer), bench.other))
    assert bench.offer.round == 2
    bench.receipts.clear()
    bench.batch(bench.sent(bad), bench.sent(good))
    again, other = bench.receipts
    assert (again, other.outcome) == (first, Outcome.DUPLICATE)


def test_a_rejected_body_that_is_a_blob_of_ours(bench: Bench) -> None:
    """A device may send the weights themselves as its body: they must not go when its round's bodies do."""
    bench.adopt(2, plan=Plan(goal=1, min_updates=1, rounds=9, deadline=3600))
    release = bench.service._coordinator.tasks[TASK].release
    weights = bench.service._blobs.get(release.weights.sha256)
    head = {"size": len(weights), "sha256": release.weights.sha256}
    bench.batch(bench.sent(replace(records.update(bench.device, bench.offer, head=head), body=weights)))
    assert [each.reason for each in bench.receipts] == ["sealed_badly"]
    bench.adopt(3)
    assert bench.service._blobs.get(release.weights.sha256) == weights


# -- batches, and disks that refuse ------------------------------------------------------------------------------


def refusing(of: object, name: str, times: int, *, passing: bool = True) -> list[str]:
    """Let a method of the store or the blobs fail so many times, as on a full disk; what it was called for."""
    real, calls = getattr(of, name), list[str]()

    def refuse(*arguments: Any) -> Any:
        calls.append(name)
        if len(calls) <= times:
            raise StorageError("somewhere", "No space left on device", passing=passing)
        return real(*arguments)

    setattr(of, name, refuse)
    return calls


@pytest.mark.parametrize("what", ["put_all", "transaction"])
def test_a_commit_is_tried_until_the_disk_takes_it(bench: Bench, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The same commit, whichever part failed: told once, counted once, and the receipt comes after it."""
    monkeypatch.setattr(service, "_RETRY_EVERY", 0.01)
    calls = refusing(bench.service._blobs if what == "put_all" else bench.service._store, what, 3)
    bench.batch(bench.sent(records.update(bench.device, bench.offer)))
    assert len(calls) == 4
    assert [each.outcome for each in bench.receipts] == [Outcome.ACCEPTED]
    assert (bench.updates, bench.service._counts["storage_failed"]) == (1, 1)


@pytest.mark.parametrize("what", ["put", "contributions", "weights_in_use"])
def test_a_reduction_is_tried_until_the_disk_takes_it(bench: Bench, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Reading, writing the new weights, erasing: the round is released once, and the next one opens."""
    monkeypatch.setattr(service, "_RETRY_EVERY", 0.01)
    bench.adopt(2, plan=Plan(goal=1, min_updates=1, rounds=9, deadline=3600))
    calls = refusing(bench.service._blobs if what == "put" else bench.service._store, what, 2)
    bench.batch(bench.sent(records.update(bench.device, bench.offer)))
    assert len(calls) > 2
    assert (bench.offer.round, bench.service._coordinator.tasks[TASK].release.number) == (2, 1)
    assert bench.service._counts["rounds_released"] == 1
    assert [each.outcome for each in bench.receipts] == [Outcome.ACCEPTED]


def test_a_disk_that_must_be_mended_ends_the_daemon(bench: Bench) -> None:
    """It waits for nothing that no waiting helps, and acknowledges nothing."""
    refusing(bench.service._blobs, "put_all", 1, passing=False)
    with pytest.raises(StorageError):
        bench.batch(bench.sent(records.update(bench.device, bench.offer)))
    assert bench.receipts == []


def test_who_stops_the_daemon_stops_its_waiting(bench: Bench) -> None:
    """Without the five seconds of the next try."""
    refusing(bench.service._blobs, "put_all", 1)
    bench.service.end(15)
    began = time.monotonic()
    with pytest.raises(StorageError):
        bench.batch(bench.sent(records.update(bench.device, bench.offer)))
    assert time.monotonic() - began < 4


def test_a_batch_is_one_transaction(broad: Bench) -> None:
    """Bodies that came along, bodies whose last chunk came, a rejection: written together, committed together."""
    names = [f"unit-{number}" for number in range(6)]
    devices = [bundle(broad.folder, name, read_clock().utc) for name in names]
    updates = [large(broad, by=device, chunked=number % 2 == 0) for number, device in enumerate(devices)]
    updates[5] = large(broad, by=devices[5], chunked=False, spoil=("body", 3))
    chunked = [each for each in zip(devices, updates, strict=True) if each[1].chunk]
    broad.batch(*(broad.sent(update, device) for device, update in chunked))
    broad.batch(*(broad.chunk(update, each, by=device) for device, update in chunked for each in (0, 1, 2)))
    written = refusing(broad.service._blobs, "put_all", 0)
    committed = refusing(broad.service._store, "transaction", 0)
    broad.batch(
        *(broad.chunk(update, 3, by=device) for device, update in chunked),
        *(broad.sent(update, device) for device, update in zip(devices, updates, strict=True) if not update.chunk),
    )
    assert broad.updates == 5
    assert (written, committed) == (["put_all"], ["transaction"])


# -- bodies in chunks --------------------------------------------------------------------------------------------

WIDTH = 256
"""Inputs of a model whose update is three chunks and a short one."""


def large(
    bench: Bench, *, by: Device | None = None, dimension: int = 3 * WIDTH, chunked: bool = True, **changes: Any
) -> Update:
    """An update in chunks."""
    values, context = records.values(3 * WIDTH), {"dimension": dimension}
    chunk = CHUNK_MIN if chunked else 0
    return records.update(by or bench.device, bench.offer, delta=values, context=context, chunk=chunk, **changes)


@pytest.fixture
def broad(bench: Bench) -> Bench:
    """A bench whose task needs chunks."""
    bench.adopt(2, records.wide(WIDTH), **records.of_width(WIDTH))
    assert bench.asked == []
    return bench


def test_chunks_are_pulled(broad: Bench) -> None:
    """The head is answered with what is missing; whatever order the chunks come in, the body is the one signed for."""
    update = large(broad)
    assert len(update.pieces) == 4
    broad.batch(broad.sent(update))
    assert broad.asked == [[0, 1, 2, 3]]
    broad.batch(broad.chunk(update, 3), broad.chunk(update, 0))
    broad.batch(broad.sent(update))
    assert broad.asked == [[1, 2]]
    broad.batch(broad.chunk(update, 2), broad.chunk(update, 1))
    assert (broad.updates, broad.service._refused) == (1, {})
    assert broad.service._blobs.get(wire.unpack(update.head, UpdateHead).sha256) == update.body


@pytest.mark.parametrize("why", ["late", "denied", "forged", "dimension", "size"])
def test_nothing_is_asked_of_a_head_that_cannot_count(broad: Bench, why: str) -> None:
    """It is answered at once, before a byte is spent on its body."""
    update = large(broad)
    if why == "late":
        broad.adopt(3, records.wide(WIDTH), **records.of_width(WIDTH))
    elif why == "denied":
        broad.deny.write_text("sensor-1\n")
    elif why == "forged":
        update = replace(update, signature=records.flip(update.signature, -1))
    elif why == "dimension":
        update = large(broad, dimension=3 * WIDTH + 1)
    else:
        update = large(broad, head={"size": 2**40})
    assert broad.asked == []
    broad.batch(broad.sent(update))
    assert broad.asked == []
    reasons = {"late": "wrong_manifest", "forged": "bad_signature", "dimension": "wrong_dimension", "size": "too_large"}
    assert broad.service._refused == {reasons.get(why, why): 1}
    assert broad.service._coordinator.reassembler.size == 0


def test_a_body_beside_a_head_in_chunks(broad: Bench) -> None:
    """Nobody asked for it, and a head that has no chunks must bring its body."""
    update = large(broad)
    both = UpdateMessage(v=1, head=update.head, sig=update.signature, body=update.body)
    broad.batch(broad.message(broad.topics.head(0, "sensor-1", update.name), wire.pack(both)))
    small = replace(records.update(broad.device, broad.offer), chunk=1)
    broad.batch(broad.sent(small))
    assert broad.service._refused == {"unasked": 1, "missing_part": 1}
    assert broad.updates == 0


def test_chunks_that_are_not_the_body(broad: Bench) -> None:
    """What was put together is not what the head was signed for: refused, not on record, and a good one counts."""
    update = large(broad)
    broad.batch(broad.sent(update))
    bad = [records.flip(piece, 1) if number == 2 else piece for number, piece in enumerate(update.pieces)]
    broad.batch(*(broad.chunk(update, number, piece) for number, piece in enumerate(bad)))
    assert (broad.updates, broad.service._refused) == (0, {"wrong_digest": 1})
    broad.batch(broad.sent(update))
    broad.batch(*(broad.chunk(update, number) for number in range(4)))
    assert broad.updates == 1


def test_a_device_that_is_denied_while_its_chunks_come(broad: Bench) -> None:
    """The list is about now, not about when the head came."""
    update = large(broad)
    broad.batch(broad.sent(update))
    broad.deny.write_text("sensor-1\n")
    broad.batch(*(broad.chunk(update, number) for number in range(4)))
    assert (broad.updates, broad.service._refused) == (0, {"denied": 1})


def test_a_full_disk_stops_no_status(tmp_path: Path) -> None:
    """What the operator reads is written when there is room again; until then the last one stays."""
    with small_disk(tmp_path / "state", 4 << 20) as disk:
        bench = Bench(tmp_path)
        bench.service._show()
        before = (disk / "status.json").read_bytes()
        bench.service._count("something")
        with filled(disk):
            bench.service._show()
            assert [path.name for path in disk.glob("status*")] == ["status.json"]
            assert (disk / "status.json").read_bytes() == before
        bench.service._show()
        assert b"something" in (disk / "status.json").read_bytes()


def condemn(bench: Bench, *names: str) -> None:
    """Let the process have died of these three times."""
    folder = Path(bench.service._config.state.directory)
    hashed = [sha256(name.encode()).hexdigest()[:32] for name in names]
    note = {"hand": [], "alone": False, "suspects": dict.fromkeys(hashed, 2)}
    (folder / "in-hand").write_text(json.dumps(note) + "\n")
    bench.restart()


def test_what_is_condemned_is_not_handled(broad: Bench) -> None:
    """A message is refused; an update in chunks is given up at its last one, and answered for good."""
    small, update = large(broad, by=broad.other, chunked=False), large(broad)
    head = broad.sent(small, broad.other)
    condemn(broad, fingerprint(head), f"sensor-1 {update.name}")
    broad.batch(head, broad.sent(update))
    assert broad.service._refused == {"quarantined": 1}
    assert broad.asked == [[0, 1, 2, 3]]
    broad.batch(*(broad.chunk(update, number) for number in range(4)))
    assert broad.service._refused == {"quarantined": 2}
    assert [(each.outcome, each.reason) for each in broad.receipts] == [(Outcome.REJECTED, "quarantined")]
    assert (broad.updates, broad.service._coordinator.reassembler.size) == (0, 0)
    broad.batch(broad.sent(update))
    assert [(each.outcome, each.reason) for each in broad.receipts] == [(Outcome.REJECTED, "quarantined")]
    assert len(broad.service._quarantine) == 2


def test_chunks_kill_nobody_but_the_last(broad: Bench) -> None:
    """What a death may be blamed on is noted: messages, and updates that become whole in this batch."""
    update = large(broad)
    broad.batch(broad.sent(update))
    note = Path(broad.service._config.state.directory) / "in-hand"

    def noted(*events: Message) -> list[int]:
        return [len(json.loads(note.read_bytes().partition(b"\n")[0])["hand"]) for _ in broad.service.portions(events)]

    assert noted(broad.chunk(update, 0), broad.chunk(update, 1), broad.chunk(update, 2)) == [0]
    assert noted(*(broad.chunk(update, number) for number in range(4)), broad.chunk(update, 0)) == [5]
    assert noted(broad.sent(update)) == [1]


def test_the_fold_is_rebuilt(bench: Bench) -> None:
    """After a restart it is made again from rows and bodies, in their order, and goes on: bit for bit the same sum."""
    bench.adopt(2, plan=Plan(goal=3, min_updates=1, rounds=9, deadline=3600), algorithm=FedAvg("uniform"))
    third = bundle(bench.folder, "sensor-3", read_clock().utc)
    values = np.random.default_rng(3).normal(size=(3, records.DIMENSION)).astype("<f4")
    mean = (values[0] + values[1] + values[2]) / np.float32(3)
    for device, delta in zip((bench.device, bench.other, third), values, strict=True):
        bench.restart()
        bench.batch(bench.sent(records.update(device, bench.offer, delta=delta.tobytes()), device))
    release = bench.service._coordinator.tasks[TASK].release
    assert release.number == 1
    weights = tensors.load(bench.service._blobs.get(release.weights.sha256), records.LAYOUT)["weight"]
    assert weights.tobytes() == mean.tobytes()


# -- the operator ------------------------------------------------------------------------------------------------


def ask(bench: Bench, verb: Any, to: int | None = None, task: str = TASK) -> dict[str, Any]:
    """What the daemon answers."""
    answers: list[Any] = []
    bench.batch(ControlRequest(control.Request(verb, task, to), answers.append))
    (answer,) = answers
    found: dict[str, Any] = answer
    return found


def test_what_the_operator_wants_survives_a_restart(bench: Bench) -> None:
    """Paused stays paused, stopped stays stopped, and resumed opens the next round."""
    assert ask(bench, "pause")["state"] == "paused"
    bench.restart()
    task = bench.service._coordinator.tasks[TASK]
    assert (task.state, task.phase) == ("paused", "collecting")
    assert ask(bench, "stop")["phase"] == "stopped"
    assert bench.offer.state is OfferState.FINISHED
    bench.restart()
    assert bench.service._coordinator.tasks[TASK].phase == "stopped"
    assert ask(bench, "resume")["phase"] == "collecting"
    assert bench.offer.round == 2
    assert "no task other here" in ask(bench, "stop", task="other")["error"]


def test_rollbacks(bench: Bench) -> None:
    """To the release before, to a named one, and further back the second time; what is not kept is said."""
    assert "no earlier release" in ask(bench, "rollback")["error"]
    bench.adopt(2, plan=Plan(goal=1, min_updates=1, rounds=50, deadline=3600))
    task = bench.service._coordinator.tasks[TASK]
    weights = [task.release.weights]
    for number in range(1, 4):
        bench.batch(bench.sent(records.update(bench.device, bench.offer, delta=spike(0.1 * number))))
        weights.append(task.release.weights)
    assert len({each.sha256 for each in weights}) == 4

    assert ask(bench, "rollback")["release"] == 4
    assert task.release.weights == weights[2]
    assert ask(bench, "rollback")["release"] == 5
    assert task.release.weights == weights[1]
    assert ask(bench, "rollback", 3)["release"] == 6
    assert task.release.weights == weights[3]
    assert "release 77 is no longer kept; kept are 5, 4, 3, 2, 1, 0" in ask(bench, "rollback", 77)["error"]
    assert "already" in ask(bench, "rollback", 6)["error"]
    assert [each.restores for each in bench.service._store.releases(TASK, 2, 3)] == [3, 1, 2]
    bench.restart()
    assert bench.service._coordinator.tasks[TASK].release.number == 6
    assert bench.offer.round == 7


def test_a_rollback_to_lost_weights_is_refused(bench: Bench) -> None:
    """A release whose weights are gone from the disk can be brought back by nobody."""
    bench.adopt(2, plan=Plan(goal=1, min_updates=1, rounds=50, deadline=3600))
    first = bench.service._coordinator.tasks[TASK].release.weights.sha256
    bench.batch(bench.sent(records.update(bench.device, bench.offer, delta=spike(0.5))))
    bench.service._blobs.delete(first)
    assert "release 0 is no longer kept" in ask(bench, "rollback")["error"]


def spoil(bench: Bench, name: bytes) -> None:
    """A bit of a blob tips over on the disk."""
    path = file_of(bench.folder / "state" / "blobs", name)
    whole = path.read_bytes()
    path.write_bytes(records.flip(whole, -1))


def retained(bench: Bench) -> list[Message]:
    """What the broker keeps of the task's release and its chunks, as it sends it to who subscribes."""
    kept = {topic: payload for topic, payload in bench.publications if "/blob/" in topic or topic == task_release(TASK)}
    return [replace(bench.message(*each), retain=True) for each in kept.items()]


def test_a_rollback_to_damaged_weights_is_refused(bench: Bench) -> None:
    """What cannot be published is no way back."""
    bench.adopt(2, plan=Plan(goal=1, min_updates=1, rounds=50, deadline=3600))
    first = bench.service._coordinator.tasks[TASK].release.weights.sha256
    bench.batch(bench.sent(records.update(bench.device, bench.offer, delta=spike(0.5))))
    spoil(bench, first)
    assert "release 0 is no longer kept" in ask(bench, "rollback")["error"]


# -- what the disk spoils ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inline", [True, False])
def test_damaged_weights_are_taken_back_from_the_broker(bench: Bench, inline: bool) -> None:
    """A round whose weights cannot be read keeps what it has until they are back; then its release is exact."""
    if not inline:
        bench.limit(inline_max=10)
    bench.adopt(2, plan=Plan(goal=1, min_updates=1, rounds=50, deadline=3600))
    task = bench.service._coordinator.tasks[TASK]
    newer = bench.message(bench.topics.device_status("sensor-1"), wire.pack(structs.replace(status(), v=2)))
    bench.batch(bench.sent(records.update(bench.device, bench.offer, delta=spike(0.25))), newer)
    for number in range(len(bench.publications)):
        bench.service._distribution.published(number, "", read_clock())
    base = task.release.weights
    assert bool(base.chunks) is not inline
    kept = retained(bench)
    spoil(bench, base.sha256)
    bench.batch(bench.sent(records.update(bench.device, bench.offer, delta=spike(0.5))))
    assert (task.phase, task.release.number, task.closing is not None) == ("damaged", 1, True)
    assert bench.service._counts["releases_damaged"] == 1
    bench.restart()
    bench.batch(newer)
    task = bench.service._coordinator.tasks[TASK]
    assert (task.phase, task.release.number) == ("damaged", 1)
    bench.batch(*(each for each in kept if "/blob/" not in each.topic))
    bench.batch(*kept)
    assert (task.phase, task.release.number) == ("collecting", 2)
    found = tensors.load(bench.service._blobs.get(task.release.weights.sha256), records.LAYOUT)["weight"]
    assert found.ravel()[0] == np.float32(0.75)


@pytest.mark.parametrize("way", ["rollback", "stop", "version"])
def test_weights_that_are_lost_everywhere(bench: Bench, way: str) -> None:
    """They end no daemon, whatever is started again how often; other tasks go on, and the operator has three ways."""
    bench.adopt(2, plan=Plan(goal=1, min_updates=1, rounds=50, deadline=3600))
    bench.batch(bench.sent(records.update(bench.device, bench.offer, delta=spike(0.5))))
    spoil(bench, bench.service._coordinator.tasks[TASK].release.weights.sha256)
    for _ in range(2):
        bench.restart()
    bench.batch(bench.sent(records.update(bench.device, bench.offer, delta=spike(0.5))))
    for _ in range(2):
        bench.restart()
        assert bench.service._coordinator.tasks[TASK].phase == "damaged"
    bench.connect()
    summary = service._summary(bench.service._coordinator.tasks[TASK])
    assert (summary["phase"], summary["updates"]) == ("damaged", 1)
    match way:
        case "rollback":
            assert ask(bench, "rollback")["phase"] == "collecting"
            bench.batch(bench.sent(records.update(bench.device, bench.offer, delta=spike(0.5))))
            assert bench.service._coordinator.tasks[TASK].release.number == 3
        case "stop":
            ask(bench, "stop")
            assert bench.offer.state is OfferState.FINISHED
        case _:
            bench.adopt(3)
            assert bench.service._coordinator.tasks[TASK].phase == "collecting"


def test_a_damaged_graph_is_taken_back_from_the_broker(bench: Bench) -> None:
    """The release before the newest has the same one: with it the newest goes out."""
    bench.adopt(2, plan=Plan(goal=1, min_updates=1, rounds=50, deadline=3600))
    kept = retained(bench)
    train, _, _ = bench.service._store.model(TASK, 2)
    spoil(bench, train)
    bench.publications.clear()
    bench.batch(bench.sent(records.update(bench.device, bench.offer, delta=spike(0.5))))
    assert retained(bench) == []
    bench.batch()
    task = bench.service._coordinator.tasks[TASK]
    assert task.damaged
    bench.batch(*kept)
    assert not task.damaged
    (again,) = retained(bench)
    assert wire.unpack(wire.unpack(again.payload, ReleaseMessage).release.payload, Release).number == 1


def test_what_comes_back_damaged_is_asked_for_once(bench: Bench) -> None:
    """A broker that has nothing better must not keep us asking."""
    bench.adopt(2, plan=Plan(goal=1, min_updates=1, rounds=50, deadline=3600))
    kept = retained(bench)
    bench.batch(bench.sent(records.update(bench.device, bench.offer, delta=spike(0.5))))
    spoil(bench, bench.service._coordinator.tasks[TASK].release.weights.sha256)
    bench.batch(bench.sent(records.update(bench.device, bench.offer, delta=spike(0.5))))
    for _ in range(3):
        bench.batch(*kept)
    task = bench.service._coordinator.tasks[TASK]
    assert (task.phase, bench.service._counts["releases_damaged"]) == ("damaged", 1)
    assert task.closing is not None


# -- large releases ----------------------------------------------------------------------------------------------


def test_a_publication_is_acknowledged_when_it_was_handled(bench: Bench) -> None:
    """Also the one that came in the same batch as the barrier: a crash before its own turn must not lose it."""
    bench.service._store.close()
    bench.service._lock.close()  # type: ignore[attr-defined]
    bench.service = bench._start(bench.service._config)
    acknowledged: list[str] = []
    bench.service._link.acknowledge = lambda message: acknowledged.append(message.topic)  # type: ignore[method-assign]
    message = records.release(bench._keys, records.manifest(bench._keys, TASK, 2))
    own = bench.message(bench.topics.aggregator_status(0), bench.service._presence(online=True))
    early, late = (bench.message(RELEASE, wire.pack(message)) for _ in range(2))
    bench.batch(LinkUp(False, None), early)
    bench.batch(late, own)
    assert acknowledged == [own.topic]
    assert bench.service._coordinator.tasks[TASK].manifest.version == 1
    assert bench.service._driver.turn(0.0)
    assert acknowledged == [own.topic, RELEASE, RELEASE]
    assert bench.service._coordinator.tasks[TASK].manifest.version == 2
    assert not bench.service._early


def test_a_large_release_leaves_in_chunks(bench: Bench) -> None:
    """What is above inline_max is cut to pieces that the broker takes."""
    config = bench.service._config
    bench.service._config = structs.replace(config, limits=structs.replace(config.limits, inline_max=10))
    bench.adopt(2, plan=Plan(goal=1, min_updates=1, rounds=50, deadline=3600))
    bench.service._packet_max = 2048
    bench.batch(bench.sent(records.update(bench.device, bench.offer, delta=spike(0.5))))
    release = bench.service._coordinator.tasks[TASK].release
    assert (release.v, release.weights.chunk_size) == (2, 1024)
    assert [topic for topic, _ in bench.publications if "/blob/" in topic]


def test_what_expires_soon_is_told(bench: Bench) -> None:
    """Once a day, with the days that are left; the status has them for every certificate."""
    assert set(bench.service._days_left) == {"agg-0.crt", "ca.crt"}
    assert min(bench.service._days_left.values()) > 30
    due = bench.service._daily_due
    assert due is not None and due > read_clock().mono + 86_000


def test_rows_of_long_ago_go(bench: Bench) -> None:
    """Once a day what no device asks for any more is forgotten; what is younger stays."""
    bench.adopt(2, plan=Plan(goal=1, min_updates=1, rounds=50, deadline=3600))
    for number in range(1, 4):
        bench.batch(bench.sent(records.update(bench.device, bench.offer, delta=spike(0.1 * number))))
    service = bench.service
    with service._store.transaction():
        service._store.end_round(TASK, 2, 1, "released", read_clock().utc - 401 * 86_400)

    def kept(yesterday: float) -> list[bool]:
        """Which rows are left after a look, when the clock said so much less a day ago."""
        service._daily_due = now = read_clock().mono
        service._looked = Instant(now - 86_400, read_clock().utc - yesterday)
        service._driver.turn(0.0)
        rows = [service._store.recall(TASK, 2, number, bench.device.name) for number in range(1, 4)]
        return [row is not None for row in rows]

    assert kept(86_400 + 500 * 86_400) == [True, True, True], "a clock that was set today may be wrong"
    assert kept(86_400) == [False, True, True]
    assert service._daily_due > read_clock().mono + 86_000


def test_what_the_broker_does_not_take_whole_leaves_in_chunks(bench: Bench) -> None:
    """However small inline_max calls it."""
    bench.adopt(
        2, records.wide(400), plan=Plan(goal=1, min_updates=1, rounds=9, deadline=3600), **records.of_width(400)
    )
    bench.service._packet_max = 1100
    update = records.update(bench.device, bench.offer, delta=bytes(4 * 1200), context={"dimension": 1200})
    bench.batch(bench.sent(update))
    release = bench.service._coordinator.tasks[TASK].release
    assert (release.number, release.weights.chunk_size) == (1, CHUNK_MIN)
    assert bench.service._config.limits.inline_max > release.weights.size


def asked(bench: Bench, **request: Any) -> dict[str, Any]:
    """The answer to a question about devices."""
    answers: list[Any] = []
    bench.batch(ControlRequest(control.Request("devices", **request), answers.append))
    (answer,) = answers
    assert isinstance(answer, dict)
    return answer


def test_devices_say_what_they_wait_for(bench: Bench) -> None:
    """Each as it said itself, by name; counted by obstacle for the whole fleet."""
    waiting = status(False, obstacles=["mains", "cpu", "mains"], version="9")
    bench.batch(
        bench.message(bench.topics.device_status("sensor-2"), wire.pack(waiting)),
        bench.message(bench.topics.device_status("sensor-3"), wire.pack(status(False))),
        bench.message(bench.topics.device_status("sensor-4"), wire.pack(status(False, online=False, obstacles=["io"]))),
    )
    answer = asked(bench)
    assert not answer["more"]
    rows = {row["device"]: row for row in answer["devices"]}
    assert list(rows) == ["sensor-1", "sensor-2", "sensor-3", "sensor-4"]
    assert rows["sensor-1"]["eligible"] and rows["sensor-2"]["obstacles"] == ["mains", "cpu", "mains"]
    assert rows["sensor-2"]["version"] == "9" and abs(rows["sensor-2"]["heard"] - read_clock().utc) < 60
    assert [row["device"] for row in asked(bench, waiting=True)["devices"]] == ["sensor-2", "sensor-3"]
    bench.service._show()
    shown = json.loads((bench.folder / "state" / "status.json").read_text())
    assert shown["waiting"] == {"mains": 1, "cpu": 1, "settling": 1}


def test_a_fleet_comes_in_pages(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many devices, and bytes, as an answer holds; the next page begins after the last name."""
    monkeypatch.setattr(service, "_PAGE", 3)
    presence = bench.service._coordinator.devices["sensor-1"]
    bench.service._coordinator.devices |= {f"d-{number}": presence for number in range(7)}
    found, after = [], ""
    while True:
        answer = asked(bench, after=after)
        names = [row["device"] for row in answer["devices"]]
        assert len(names) <= 3
        found += names
        if not answer["more"]:
            break
        after = names[-1]
    assert found == sorted(bench.service._coordinator.devices)
    monkeypatch.setattr(service, "_PAGE_BYTES", 1)
    assert len(asked(bench)["devices"]) == 1 and asked(bench)["more"]


def test_obstacles_are_counted_up_to_a_bound() -> None:
    """Devices choose the words."""
    many = [status(False, obstacles=[f"o{number}"]) for number in range(100)] + [status(False, obstacles=["mains"])] * 2
    found = service.waiting(many)
    assert next(iter(found.items())) == ("mains", 2) and len(found) == 32


def test_a_request_without_a_task_is_refused(bench: Bench) -> None:
    """All but devices are for one."""
    answers: list[Any] = []
    bench.batch(ControlRequest(control.Request("pause"), answers.append))
    assert "none is named" in answers[0]["error"]
