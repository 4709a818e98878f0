"""edge_agent.renewal: when the next certificate is asked for."""

import queue
from pathlib import Path

import pytest
from msgspec import structs

from aggregator import ca
from edge_agent import config as settings
from edge_agent import renewal
from edge_agent.config import AgentConfig, Enrol
from edge_agent.renewal import Renewal, RenewalEvent, RenewalFailed
from shared.machine import Instant
from tests.records import NOW

NOBODY = "https://localhost:1"
ASKED = Enrol(NOBODY)


@pytest.fixture
def config(tmp_path: Path) -> AgentConfig:
    """Of a device whose certificate is fresh."""
    ca.init_fleet(tmp_path / "fleet", "test", ["localhost"], now=NOW.utc, passphrase=None)
    ca.add_device(tmp_path / "fleet", "sensor-1", tmp_path / "bundle", now=NOW.utc, passphrase=None)
    found = settings.load(tmp_path / "bundle" / "agent.toml", {})
    return structs.replace(found, device=structs.replace(found.device, state_dir=tmp_path / "state"))


class Device:
    """One that renews; `draw` is its random number."""

    def __init__(self, config: AgentConfig, draw: float, enrol: Enrol) -> None:
        config = structs.replace(config, enrol=enrol)
        self.posted: queue.Queue[RenewalEvent] = queue.Queue()
        self.mine = renewal.choose(config, NOW.utc)
        self.renewal = Renewal(config, self.mine, NOW, self.posted.put, lambda: NOW.utc, lambda: draw)

    @property
    def share(self) -> float:
        """Of the certificate's life that is over when the next is asked for."""
        assert self.renewal.due is not None
        return (self.renewal.due - NOW.utc) / (self.mine.ends - NOW.utc)


def test_it_is_asked_for_after_two_thirds_of_its_life(config: AgentConfig) -> None:
    """A device that is away for a third of it still has one, and a registrar is not asked more often than needed."""
    shares = [Device(config, draw, ASKED).share for draw in (0.999, 0.5, 0.0)]
    assert shares == sorted(set(shares))  # devices that enrolled together do not renew together
    assert 0.60 < shares[0] < 0.62 and 0.65 < shares[-1] < 0.67
    assert 0.45 < Device(config, 0.999, Enrol(NOBODY, renew_at=0.5)).share < 0.46
    alone = Device(config, 0.5, Enrol()).renewal
    assert (alone.due, alone.deadline(NOW), alone.turn(NOW)) == (None, None, False)


def test_it_is_asked_for_when_it_is_due_and_not_before(config: AgentConfig) -> None:
    """Once; and again after a while where nobody answers."""
    device = Device(config, 0.5, ASKED)
    assert device.renewal.due is not None
    wait = device.renewal.due - NOW.utc
    assert device.renewal.deadline(NOW) == pytest.approx(NOW.mono + wait)

    def after(seconds: float) -> Instant:
        return Instant(NOW.mono + seconds, NOW.utc + seconds)

    assert device.renewal.turn(after(wait - 60)) is False
    assert device.renewal.deadline(after(wait - 60)) == pytest.approx(NOW.mono + wait)
    assert device.renewal.turn(after(wait + 1)) is False
    assert device.renewal.deadline(after(wait + 1)) is None  # it is being asked for
    told = device.posted.get(timeout=60)
    assert isinstance(told, RenewalFailed) and told.reason == "unreachable" and not told.hopeless
    device.renewal.take(told, after(wait + 2))
    again = device.renewal.deadline(after(wait + 2))
    assert again is not None and NOW.mono + wait + 30 < again < NOW.mono + wait + 120
