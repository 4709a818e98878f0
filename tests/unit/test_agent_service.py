"""The agent's shell without a broker and without a trainer: what must not end it."""

from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from aggregator import ca
from edge_agent import config as settings
from edge_agent import delivery
from edge_agent import participation as core
from edge_agent.child import TrainerSaid
from edge_agent.delivery import Update
from edge_agent.jobs import Done
from edge_agent.service import Service, Stop, restored
from edge_agent.store import Kept, Store
from shared import identity, logs, signing, wire
from shared.driver import read_clock
from shared.errors import ConfigError
from shared.machine import Instant
from shared.messages import Role, Signed
from shared.mqtt import Message
from shared.topics import task_release, task_round
from shared.trust import Position
from tests.hostile import records
from tests.records import NOW, Records, key


@pytest.fixture
def service(tmp_path: Path) -> Service:
    """An agent of a fresh fleet that was never started."""
    now = read_clock()
    ca.init_fleet(tmp_path / "fleet", "test", ["localhost"], now=now.utc, passphrase=None)
    ca.add_device(tmp_path / "fleet", "sensor-1", tmp_path / "bundle", now=now.utc, passphrase=None)
    found = settings.load(tmp_path / "bundle" / "agent.toml", {})
    device = structs.replace(found.device, state_dir=tmp_path / "state", run_dir=tmp_path / "run")
    return Service(structs.replace(found, device=device), now)


def test_a_result_whose_body_is_gone_is_a_failure_and_not_the_end(service: Service) -> None:
    """The trainer's word is not the file: a full or broken disk costs the update and never the agent."""
    update = Update("job", "points", (1, 1), b"head", bytes(32), 1, 10, 0, 1 << 40)
    for effect in (delivery.SendUpdate(update, 1), delivery.SendChunk(replace(update, chunk_size=5), 1)):
        (lost,) = service.perform(effect)
        assert isinstance(lost, core.UpdateLost) and lost.head == update.digest
    assert service._counts["updates_sent"] == 0


def test_a_clock_that_was_set_is_looked_into(service: Service) -> None:
    """The calendar and every word with a time in it depend on it."""
    service._schedule.start(NOW)
    service.handle(Stop(15), Instant(NOW.mono + 1, NOW.utc + 1))
    assert service.mailbox.take(0.0) == []
    service.handle(Stop(15), Instant(NOW.mono + 2, NOW.utc + 86_400))
    assert service.mailbox.take(0.0) == [core.ClockSet()]


def hand(service: Service, topic: str, message: object) -> None:
    """A message arrives."""
    service.mailbox.post(Message(topic, wire.pack(message), retain=True, qos=1, mid=1, generation=0))
    service._driver.turn(0.0)


def test_what_was_accepted_is_on_disk(service: Service, tmp_path: Path) -> None:
    """Release and offer are stored with their positions, and older ones are refused by a process that starts anew."""
    keys = records.Keys(
        identity.load_signing_key(tmp_path / "fleet" / "publisher" / "publisher.key"),
        identity.load_signing_key(tmp_path / "fleet" / "aggregator" / "signing.key"),
        identity.load_signing_key(tmp_path / "fleet" / "root" / "root.key"),
    )
    described = records.manifest(keys, "points", 3)
    message = records.release(keys, described)

    def offer(number: int) -> Signed:
        return signing.sign(records.offer(described, message, number), Role.AGGREGATOR, keys.aggregator)

    hand(service, task_release("points"), message)
    hand(service, task_round("points"), offer(2))
    assert service._refused == {}
    (kept,) = Store(tmp_path / "state").load()
    assert kept.release_position is not None and kept.release_position.rank == (3, 0)
    assert kept.offer_position is not None and kept.offer_position.rank == (3, 2, 0)
    again = Service(service._config, read_clock())
    hand(again, task_release("points"), records.release(keys, records.manifest(keys, "points", 2)))
    hand(again, task_round("points"), offer(1))
    assert again._refused == {"rollback": 2}


RECORDS = Records()


def stored() -> Kept:
    """A task as it lies on disk, accepted under the root of RECORDS."""
    message = RECORDS.message(RECORDS.manifest(version=7))
    place = Position((7,), signing.digest(message.manifest))
    release = Position((7, 0), signing.digest(message.release))
    return Kept("points", message.manifest, message.release, release, place, Position((7, 3, 0), bytes(32)), (7, 3))


def test_a_task_that_the_root_no_longer_stands_behind_is_forgotten(service: Service, tmp_path: Path) -> None:
    """A publisher's key was stolen and the root replaced: neither its model nor its version numbers bind a device."""
    found = restored(stored(), RECORDS.trust, NOW.utc)
    assert found is not None and found.release_position == stored().release_position
    assert restored(stored(), Records(publisher=key(9)).trust, NOW.utc) is None
    records_here = Records()
    message = records_here.message()
    first = Position((1,), signing.digest(message.manifest)), Position((1, 0), signing.digest(message.release))
    Store(tmp_path / "state").keep_release("points", message, *first)
    assert Service(service._config, read_clock())._participation.tasks == {}
    assert Store(tmp_path / "state").load() == []


def test_a_task_that_expired_keeps_its_place() -> None:
    """Otherwise an older manifest with a longer term could come back."""
    found = restored(stored(), RECORDS.trust, NOW.utc + 10**5)
    assert found is not None and found == restored(stored(), RECORDS.trust, NOW.utc)


def test_the_name_of_another_device(service: Service) -> None:
    """A configuration that was made for another device is refused with both names."""
    config = service._config
    spoilt = structs.replace(config, device=structs.replace(config.device, name="sensor-2"))
    with pytest.raises(ConfigError, match=r"sensor-2.*sensor-1") as caught:
        Service(spoilt, read_clock())
    assert caught.value.key == "device.name"


def test_a_result_that_nobody_waits_for_leaves_nothing(service: Service) -> None:
    """A job that was cancelled in its last moment has written its body all the same."""
    body = service._store.outbox / "given-up.body"
    body.write_bytes(b"sealed")
    done = Done("given-up", bytes(80), 6, bytes(32), 40, 10, 10, {"loss": 1.0}, 0.5, 1.0, 1.0, 1.0, 1)
    assert service.handle(TrainerSaid(1, done), NOW) == []
    assert list(service._store.outbox.iterdir()) == []


def test_a_task_without_its_data_says_so(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """An owner who forgot the data section reads it in the log, once, and in the status, and not only nothing."""
    logs.configure("info", "json", environ={}, identifier="test")
    records_here = Records()
    message = records_here.message()
    service._participation.trust = records_here.trust
    kept = [
        each
        for each in service.handle(core.ReleaseArrived("points", message), NOW)
        if isinstance(each, core.KeepRelease)
    ]
    assert len(kept) == 1
    for effect in kept * 2:
        assert list(service.perform(effect)) == []
    told = [line for line in capsys.readouterr().err.splitlines() if '"data.missed"' in line]
    assert len(told) == 1 and "[data.points]" in told[0]
    tasks = service._status(NOW)["tasks"]
    assert isinstance(tasks, dict) and "[data.points]" in tasks["points"]["obstacle"]


def test_a_failed_training_stays_in_sight(service: Service) -> None:
    """Until one has worked, `edge-agent status` says why the last one did not."""
    assert service._status(NOW)["last_failure"] is None
    list(service.perform(core.TrainingFailed("job", "points", 3, "data", "x.npz: there is no such file", 60.0)))
    failure = service._status(NOW)["last_failure"]
    assert failure == {"task": "points", "round": 3, "reason": "data", "detail": "x.npz: there is no such file"}
    done = Done("job", bytes(80), 6, bytes(32), 40, 10, 10, {"loss": 1.0}, 0.5, 1.0, 1.0, 1.0, 1)
    list(service.perform(core.TrainingFinished("points", 4, done)))
    assert service._status(NOW)["last_failure"] is None
