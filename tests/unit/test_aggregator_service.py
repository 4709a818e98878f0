"""The aggregator's shell without a broker: what a burst of messages in one batch does to it."""

from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from msgspec import structs

from aggregator import ca
from aggregator import config as settings
from aggregator.service import Service
from shared import identity, wire
from shared.driver import read_clock
from shared.errors import ConfigError
from shared.messages import RoundOffer
from shared.mqtt import LinkUp, Message
from shared.topics import RELEASE, Topics
from tests.hostile import records
from tests.hostile.records import Device, Update
from tests.hostile.site import status

TASK = "points"


class Bench:
    """A service in a folder, with an open round for `device`; its link never starts, so what it sends waits."""

    def __init__(self, folder: Path) -> None:
        now = read_clock()
        ca.init_fleet(folder / "fleet", "test", ["localhost"], now=now.utc, passphrase=None)
        ca.add_device(folder / "fleet", "sensor-1", folder / "sensor-1", now=now.utc, passphrase=None)
        certificate = identity.load_certificate(folder / "sensor-1" / "device.crt")
        key = identity.load_key(folder / "sensor-1" / "device.key")
        self.device = Device("sensor-1", certificate.public_bytes(Encoding.DER), key)
        self.deny = folder / "denied"
        loaded = settings.load(folder / "fleet" / "aggregator" / "aggregator.toml", {})
        loaded = structs.replace(
            loaded,
            state=settings.State(directory=folder / "state"),
            trust=structs.replace(loaded.trust, deny=self.deny),
        )
        self.service = Service(loaded, now)
        self.topics = Topics(loaded.broker.prefix)
        keys = records.Keys(
            identity.load_signing_key(folder / "fleet" / "publisher" / "publisher.key"),
            identity.load_signing_key(folder / "fleet" / "aggregator" / "signing.key"),
            identity.load_signing_key(folder / "fleet" / "root" / "root.key"),
        )
        message = records.release(keys, records.manifest(keys, TASK))
        self.batch(
            LinkUp(False, None),
            self.message(RELEASE, wire.pack(message)),
            self.message(self.topics.device_status("sensor-1"), wire.pack(status())),
        )

    def message(self, topic: str, payload: bytes) -> Message:
        """As the link hands it over."""
        return Message(topic, payload, retain=False, qos=1, mid=1, generation=0)

    def batch(self, *events: object) -> None:
        """Everything at once, as after a moment in which the owner was busy."""
        for event in events:
            self.service.mailbox.post(event)  # type: ignore[arg-type]
        assert self.service._driver.turn(0.0)

    def sent(self, update: Update) -> Message:
        """An update on its topic."""
        return self.message(self.topics.head(0, self.device.name, update.name), update.payload)

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
    assert not bench.service._opened


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
