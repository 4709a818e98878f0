"""The agent's shell without a broker and without a trainer: what must not end it."""

import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import pytest
from msgspec import structs

from aggregator import ca
from edge_agent import config as settings
from edge_agent import delivery
from edge_agent import participation as core
from edge_agent.bus import Bus, BusSaid
from edge_agent.child import TrainerSaid, TrainerWrote
from edge_agent.clock import DeviceClock
from edge_agent.control import Request
from edge_agent.delivery import Update
from edge_agent.eligibility import Policy
from edge_agent.jobs import Done
from edge_agent.pressure import PressureWatch
from edge_agent.service import Service, Stop, restored
from edge_agent.shelf import Shelf
from edge_agent.store import Kept, Store
from shared import identity, logs, signing, wire
from shared.control import ControlRequest
from shared.driver import read_clock
from shared.errors import ConfigError, RemoteProtocolError, StorageError
from shared.machine import Instant, Tick
from shared.messages import DeviceStatus, Outcome, Role, Signed, UpdateHead
from shared.mqtt import LinkDown, LinkUp, Message, Published
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


def test_the_bus_is_asked_what_the_owner_wants_to_know(service: Service, tmp_path: Path) -> None:
    """By the look of a device whose owner asks for it; an answer that is new has the device looked at again."""
    program = tmp_path / "busctl"
    program.write_text('#!/bin/sh\necho \'{"type":"b","data":true}\'\n')
    program.chmod(0o755)
    service._bus = service._sensors._bus = Bus(service.mailbox.post, str(program), "unix:path=/nowhere")
    service._config = structs.replace(service._config, policy=Policy(mains=False, idle_user=True))
    (sensed,) = service.perform(core.Sense(working=False, trained=None))
    assert isinstance(sensed, core.Sensed)
    assert sensed.facts.user_idle is None
    (said,) = service.mailbox.take(30.0)
    assert isinstance(said, BusSaid)
    assert any(isinstance(each, core.Sense) for each in service.handle(said, read_clock()))
    assert not any(isinstance(each, core.Sense) for each in service.handle(said, read_clock()))
    (sensed,) = service.perform(core.Sense(working=False, trained=None))
    assert isinstance(sensed, core.Sensed)
    assert sensed.facts.user_idle is True


def test_why_is_answered_after_a_look(service: Service) -> None:
    """What is told was measured for the question, and the machine knows it as well."""
    answers: list[Mapping[str, object]] = []
    service.mailbox.post(ControlRequest(Request("why"), answers.append))
    assert service._participation.facts is None
    service._driver.turn(0.0)
    (answer,) = answers
    assert service._participation.facts is not None
    assert answer["constraints"] and "no task is known" in str(answer["answer"])
    service._driver.turn(0.0)
    assert len(answers) == 1


def test_a_probe_is_answered_by_the_broker(service: Service) -> None:
    """Its word on the device's own status, which is sent again; or the link's end, whatever comes first."""
    answers: list[Mapping[str, object]] = []

    def ask() -> None:
        service.mailbox.post(ControlRequest(Request("probe"), answers.append))
        service._driver.turn(0.0)

    ask()
    assert answers.pop() == {"published": False, "cause": "connecting"}
    service._link = Wire()  # type: ignore[assignment]  # all of a link that a probe uses
    service._said = core.PublishStatus(True, ("cpu",), ("points",), 1)
    ask()
    assert answers == []
    service.mailbox.post(Published(1, "Not authorized"))
    service._driver.turn(0.0)
    assert answers.pop() == {"published": False, "cause": "Not authorized"}
    ask()
    service.mailbox.post(Published(2, ""))
    service._driver.turn(0.0)
    assert answers.pop() == {"published": True, "cause": None}
    ask()
    service.mailbox.post(LinkDown("cut"))
    service._driver.turn(0.0)
    assert answers.pop() == {"published": False, "cause": "the link went down: cut"}
    assert service._probes == {}


class Wire:
    """A link that is up and takes everything."""

    connected = alive = True

    mid = 0

    def publish(self, topic: str, payload: bytes, *, qos: int, retain: bool) -> int:
        """What only an acknowledgement answers, and what stays there as the device's word."""
        assert qos == 1 and retain and topic == "fl/dev/sensor-1/status"
        assert structs.asdict(wire.unpack(payload, DeviceStatus))["obstacles"] == ["cpu"]
        self.mid += 1
        return self.mid


def test_status_says_that_no_model_can_be_put_anywhere(service: Service, tmp_path: Path) -> None:
    """With the folder, as programs on the device know it."""
    assert service._status(NOW)["models"] == {"folder": str(tmp_path / "state" / "models"), "closed": None}
    (tmp_path / "file").touch()
    service._shelf = Shelf(tmp_path / "file" / "models", public=True)
    shown = service._status(NOW)["models"]
    assert isinstance(shown, dict) and str(tmp_path / "file") in shown["closed"]


def test_status_says_how_load_is_noticed(service: Service) -> None:
    """By the kernel's triggers, or by the clock and why."""
    assert service._status(NOW)["sensing"] == "by the clock: not started"
    service._pressure = PressureWatch(Path("/nowhere"), {}, lambda: None)
    service._pressure.start()
    assert service._status(NOW)["sensing"] == "by pressure triggers"


def test_a_trainer_without_torch_is_an_obstacle(service: Service, tmp_path: Path) -> None:
    """Where only a start can tell that PyTorch is absent, its last words do, until it is worth another try."""
    (lent := tmp_path / "lent" / "bin").mkdir(parents=True)
    trainer = structs.replace(service._config.trainer, python=lent / "python")
    service._config = structs.replace(service._config, trainer=trainer)

    def sensed() -> bool | None:
        (event,) = service.perform(core.Sense(working=False, trained=None))
        assert isinstance(event, core.Sensed)
        return event.facts.trainer

    assert sensed() is None
    now = read_clock()
    service.handle(TrainerWrote(1, "Traceback (most recent call last):"), now)
    assert sensed() is None
    service.handle(TrainerWrote(1, "ModuleNotFoundError: No module named 'torch'"), now)
    assert sensed() is False
    service.handle(TrainerWrote(1, "ModuleNotFoundError: No module named 'torch'"), Instant(now.mono - 601, now.utc))
    assert sensed() is None


def hand(service: Service, topic: str, message: object) -> None:
    """A message arrives."""
    service.mailbox.post(Message(topic, wire.pack(message), retain=True, qos=1, mid=1, generation=0))
    service._driver.turn(0.0)


def load_keys(tmp_path: Path) -> records.Keys:
    """Of the service's fleet."""
    return records.Keys(
        identity.load_signing_key(tmp_path / "fleet" / "publisher" / "publisher.key"),
        identity.load_signing_key(tmp_path / "fleet" / "aggregator" / "signing.key"),
        identity.load_signing_key(tmp_path / "fleet" / "root" / "root.key"),
    )


def test_a_model_that_the_disk_refuses_is_put_into_use_later(service: Service, tmp_path: Path) -> None:
    """The agent goes on meanwhile and can be started anew; once the disk does, programs find the newer model."""
    keys, folder = load_keys(tmp_path), service._config.device.shelf
    folder.write_text("in the way")
    hand(service, task_release("points"), records.release(keys, records.manifest(keys, "points", 3)))
    again = Service(service._config, read_clock())
    folder.unlink()
    for each in (service, again):
        each._driver.turn(0.0)
        assert Shelf(folder, public=False).models() == []
        now = read_clock()
        for effect in each.handle(Tick(), Instant(now.mono + core.SHELF_RETRY, now.utc + core.SHELF_RETRY)):
            list(each.perform(effect))
        (model,) = Shelf(folder, public=False).models()
        assert (model.task, model.release) == ("points", 0)
        shutil.rmtree(folder)


def test_a_task_that_makes_room_goes_on_predicting(service: Service, tmp_path: Path) -> None:
    """All that is kept of it goes, but for the model in use."""
    keys = load_keys(tmp_path)
    hand(service, task_release("points"), records.release(keys, records.manifest(keys, "points", 3)))
    del service._participation.tasks["points"]
    service.commit([core.ForgetTask("points")])
    assert Store(tmp_path / "state").load() == []
    again = Service(service._config, read_clock())
    assert again._participation.tasks == {}
    (model,) = Shelf(service._config.device.shelf, public=False).models()
    assert model.task == "points" and service._shelf.path("points").joinpath("model.safetensors").exists()


def test_what_was_accepted_is_on_disk(service: Service, tmp_path: Path) -> None:
    """Release and offer are stored with their positions, and older ones are refused by a process that starts anew."""
    keys = load_keys(tmp_path)
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


def test_spacing_counts_from_before_the_restart(service: Service) -> None:
    """The end of the last training is on disk; a record that is damaged, or of a time to come, counts as now, once."""
    file = service._config.device.state_dir / "trained"
    assert service._participation.last_trained is None
    service.commit([core.KeepTrained()])
    policy = structs.replace(service._config.policy, spacing=3600.0)
    config = structs.replace(service._config, policy=policy)

    def since() -> float:
        again = Service(config, read_clock())
        assert again._participation.last_trained is not None
        return read_clock().mono - again._participation.last_trained

    assert since() < 60
    file.write_text(f"{int(read_clock().utc) - 1000}\n")
    assert 1000 <= since() < 1060
    for text in (f"{int(read_clock().utc) + 10**6}\n", "", "x", "\u0663"):
        file.write_text(text)
        assert since() < 60
        assert abs(int(file.read_text()) - read_clock().utc) < 60


class Mended(threading.Event):
    """Where the owner waits for the disk: `act` is done meanwhile, and says whether the daemon is to end."""

    def __init__(self, act: Callable[[], bool]) -> None:
        super().__init__()
        self.waits, self._act = 0, act

    def wait(self, timeout: float | None = None) -> bool:
        """Instead of seconds."""
        assert timeout is not None and timeout <= 5.0
        self.waits += 1
        return self._act()


def test_a_disk_that_refuses_is_waited_for(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """Told once, tried until it works, told again; nothing is acted on before."""
    logs.configure("info", "json", environ={}, identifier="test")
    folder = service._config.device.state_dir / "tasks" / "points"
    folder.write_text("in the way")

    def act() -> bool:
        if waited.waits == 3:
            folder.unlink()
        return False

    service._ending = waited = Mended(act)
    service.commit([core.KeepOffer("points", Position((1, 1, 0), bytes(32)))])
    assert waited.waits == 3
    told = [line for line in capsys.readouterr().err.splitlines() if '"storage.' in line]
    assert ["failed" in line for line in told] == [True, False]
    assert Store(service._config.device.state_dir).load()[0].offer_position == Position((1, 1, 0), bytes(32))


def test_a_daemon_that_waits_for_the_disk_can_be_ended(service: Service) -> None:
    """What was not stored has then not happened."""
    folder = service._config.device.state_dir / "tasks" / "points"
    folder.write_text("in the way")
    service._ending = Mended(lambda: True)
    with pytest.raises(StorageError):
        service.commit([core.KeepOffer("points", Position((1, 1, 0), bytes(32)))])
    assert Store(service._config.device.state_dir).load() == []


def test_a_certificate_that_ends_soon_is_told_daily(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From 30 days before the end of a year, or from the last third of a shorter life; also in the status."""
    logs.configure("info", "json", environ={}, identifier="test")

    def told(mono: float, utc: float) -> int:
        service._daily(Instant(mono, utc))
        return sum('"certificate.expiring"' in line for line in capsys.readouterr().err.splitlines())

    ends = service._renewal.current.ends
    day, mono = 86_400.0, service._daily_at
    assert told(mono, ends - 31 * day) == 0
    assert told(mono + 60, ends - 29 * day) == 0
    assert told(mono + day, ends - 29 * day) == 1
    assert told(mono + day + 60, ends - 29 * day) == 0
    assert told(mono + 2 * day, ends + day) == 1
    mine, born = service._renewal.current, datetime.fromtimestamp(NOW.utc, UTC)
    authority = ca.open_authority(tmp_path / "fleet", None)
    short = ca.issue_client(authority, "sensor-1", mine.key.public_key(), born, timedelta(days=28))
    service._renewal.current = replace(mine, certificate=short)
    ends = service._renewal.current.ends
    assert told(mono + 3 * day, ends - 11 * day) == 0
    assert told(mono + 4 * day, ends - 9 * day) == 1
    shown = service._status(Instant(mono, ends - 9 * day))["certificate"]
    assert isinstance(shown, dict) and (shown["days"], shown["expiring"]) == (9.0, True)


def test_a_board_whose_clock_stands_at_1970(service: Service) -> None:
    """What has expired is judged by what must have passed: an old manifest is not taken, a new one is."""
    records_here = Records()
    service._participation.trust = records_here.trust
    service._clock = DeviceClock(service._config.device.state_dir / "clock", NOW.utc, NOW, lambda: False)
    for expires, reason in ((NOW.utc - 1, "expired"), (NOW.utc + 1000, None)):
        message = records_here.message(records_here.manifest(expires=int(expires)))
        event = Message(task_release("points"), wire.pack(message), retain=True, qos=1, mid=1, generation=0)
        try:
            service.handle(event, Instant(NOW.mono, 0.0))
        except RemoteProtocolError as error:
            assert error.reason.value == reason
        else:
            assert reason is None


def kept_update(service: Service, size: int = 10) -> Update:
    """An update in the outbox."""
    body = os.urandom(size)
    service._outbox.body("0a").write_bytes(body)
    head = wire.pack(UpdateHead(1, b"context", bytes(32), size, sha256(body).digest(), 0, b"certificate", []))
    found = Update("0a", "points", (1, 1), head, sha256(head).digest(), 1, size, 0, 1 << 40)
    service.commit([delivery.KeepUpdate(found)])
    return found


def test_what_lies_in_the_outbox_is_taken_up(service: Service) -> None:
    """A new process sends the identical head with the signature of before; what is damaged it leaves."""
    found = kept_update(service)
    again = Service(service._config, read_clock())
    assert [each.update for each in again._participation.delivery.waiting] == [found]
    assert again._outbox.signature("0a") == service._outbox.signature("0a")
    shown = again._status(read_clock())["outbox"]
    assert isinstance(shown, list) and (shown[0]["bytes"], shown[0]["next_try"]) == (10, None)
    service._outbox.body("0a").write_bytes(b"damaged")
    assert list(Service(service._config, read_clock())._participation.delivery.waiting) == []
    assert list(service._store.outbox.iterdir()) == []


def test_an_acknowledgement_deletes_nothing(service: Service) -> None:
    """The broker has it, and that is all that says; the files go with the receipt."""
    found = kept_update(service)
    service._participation.delivery.resume(found, 0.0)
    service.handle(LinkUp(False, None), read_clock())
    list(service.perform(delivery.SendUpdate(found, 1)))
    service._flying[7] = (found.digest, 0)
    service.handle(Published(7, ""), read_clock())
    assert service._flying == {}
    assert {path.name for path in service._store.outbox.iterdir()} == {"0a.entry", "0a.body"}
    settled = core.Settled(found, Outcome.ACCEPTED, "")
    service.commit([settled])
    assert len(list(service._store.outbox.iterdir())) == 2
    assert Store(service._config.device.state_dir).load()[0].worked == (1, 1)
    assert list(service.perform(settled)) == []
    assert list(service._store.outbox.iterdir()) == []


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
