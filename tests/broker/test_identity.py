"""Who the broker lets in, and what the ACL gives them: the templates of mosquitto/ in a real mosquitto."""

import socket
import ssl
import time
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from aggregator import ca
from aggregator.broker import Broker
from shared.errors import ConfigError
from tests.broker.broker import NOT_AUTHORIZED, Fleet, Identity, Peer, Refused, Will, refusal
from tests.forgery import forge

pytestmark = pytest.mark.usefixtures("broker")

UPDATE = "0123456789abcdef0123456789abcdef"
NOW = datetime.now(UTC)


def _forged(
    fleet: Fleet, folder: Path, name: str, *, by: ca.Authority | None = None, born: datetime | None = None
) -> Identity:
    """A client's certificate of 30 days for any name, by the fleet's CA unless by another."""
    made = forge(by or ca.open_authority(fleet.folder, None), name, born=born)
    found = Identity(folder / "client.crt", folder / "client.key")
    found.certificate.write_bytes(made.pem)
    found.key.write_bytes(made.key_pem)
    return found


def _publish(fleet: Fleet, identity: Identity, topic: str, payload: bytes, retain: bool = False) -> int:
    """On a connection of its own: mosquitto 2.0.11 ends one whose message the ACL refused, after acknowledging it."""
    with Peer(fleet, identity) as peer:
        return peer.publish(topic, payload, retain)


# -- who gets in -------------------------------------------------------------------------------------------------


def test_the_name_is_the_certificates(fleet: Fleet) -> None:
    """A device, the operator and the aggregator get in under their certificate's name, whatever they ask for."""
    for identity, name in (
        (fleet.device("dev-1"), "dev-1"),
        (fleet.operator, "_operator"),
        (fleet.aggregator, "_agg-0"),
    ):
        with Peer(fleet, identity, "somebody-else") as peer, Peer(fleet, identity, "yet-another"):
            assert not peer.is_up(), "two ids of one certificate are one client"
        assert f" as {name} (p5, c1, k60, u'{name}')" in fleet.broker.log.read_text()


def test_no_certificate(fleet: Fleet) -> None:
    """A client without a certificate is refused in the handshake."""
    assert "certificate required" in refusal(fleet, None)


def test_plain_tcp(fleet: Fleet) -> None:
    """MQTT without TLS gets no answer."""
    with socket.create_connection(("127.0.0.1", fleet.port), timeout=10) as plain:
        plain.sendall(bytes.fromhex("101100044d5154540502003c0000046465762d"))
        try:
            answer = plain.recv(1)
        except ConnectionResetError:
            answer = b""
        # At most a TLS alert (type 21), never a CONNACK (type 2 in the upper half of the first byte).
        assert answer in (b"", b"\x15")


def test_tls_1_2(fleet: Fleet) -> None:
    """TLS 1.2 is refused even with a good certificate."""
    with pytest.raises(Refused):
        Peer(fleet, fleet.device("dev-1"), tls=ssl.TLSVersion.TLSv1_2)


def test_foreign_authority(fleet: Fleet, tmp_path: Path) -> None:
    """Another fleet's CA admits nobody, not under a service's name either."""
    ca.init_fleet(tmp_path / "other", "other-fleet", ["localhost"], now=time.time(), passphrase=None)
    for name in ("dev-1", "_agg-0"):
        by = ca.open_authority(tmp_path / "other", None)
        assert "unknown ca" in refusal(fleet, _forged(fleet, tmp_path, name, by=by))


def test_forged_authority_of_the_same_name(fleet: Fleet, tmp_path: Path) -> None:
    """A CA that calls itself like ours admits nobody."""
    ca.init_fleet(tmp_path / "forged", "test-fleet", ["localhost"], now=time.time(), passphrase=None)
    by = ca.open_authority(tmp_path / "forged", None)
    assert by.certificate.subject == ca.open_authority(fleet.folder, None).certificate.subject
    assert "unknown ca" in refusal(fleet, _forged(fleet, tmp_path, "dev-1", by=by))


def test_expired(fleet: Fleet, tmp_path: Path) -> None:
    """A certificate of yesterday is refused."""
    assert "expired" in refusal(fleet, _forged(fleet, tmp_path, "dev-1", born=NOW - timedelta(days=31)))


def test_not_yet_valid(fleet: Fleet, tmp_path: Path) -> None:
    """A certificate of next week is refused."""
    assert "bad certificate" in refusal(fleet, _forged(fleet, tmp_path, "dev-1", born=NOW + timedelta(days=7)))


def test_server_only(fleet: Fleet) -> None:
    """The broker's own certificate is not a client's."""
    stolen = Identity(fleet.folder / "broker" / "server.crt", fleet.folder / "broker" / "server.key")
    assert "unsupported certificate" in refusal(fleet, stolen)


def test_certificate_without_its_key(fleet: Fleet) -> None:
    """A certificate alone, which everybody may see, is worth nothing."""
    with pytest.raises((Refused, ssl.SSLError)):
        Peer(fleet, replace(fleet.device("dev-1"), key=fleet.device("dev-2").key))


# -- sessions ----------------------------------------------------------------------------------------------------


def test_client_id_hijack(fleet: Fleet) -> None:
    """A device that asks for the aggregator's client id takes over nothing and gets nothing that waits for it."""
    with Peer(fleet, fleet.aggregator, "_agg-0", clean=False) as aggregator:
        aggregator.subscribe("fl/up/0/#")
        with Peer(fleet, fleet.device("dev-1"), "_agg-0", clean=False) as thief:
            assert not thief.session_present
            assert aggregator.is_up()
            thief.subscribe("fl/up/0/#")
            assert thief.publish(f"fl/up/0/dev-1/{UPDATE}/head", b"mine") < 128
            assert thief.fence() == []
        assert aggregator.fence() == [(f"fl/up/0/dev-1/{UPDATE}/head", b"mine")]
    # The aggregator is away: what arrives now waits for it, and for nobody who claims its id.
    with Peer(fleet, fleet.device("dev-2"), "_agg-0", clean=True) as device:
        device.publish(f"fl/up/0/dev-2/{UPDATE}/head", b"waits")
    with Peer(fleet, fleet.aggregator, clean=False) as aggregator:
        assert aggregator.session_present
        assert aggregator.fence() == [(f"fl/up/0/dev-2/{UPDATE}/head", b"waits")]
    with Peer(fleet, fleet.aggregator) as aggregator:
        assert not aggregator.session_present


def test_session_outlives_the_broker(fleet: Fleet, broker: Broker) -> None:
    """What waits for the aggregator and what is retained survive a clean restart of the broker."""
    with Peer(fleet, fleet.aggregator, clean=False) as aggregator:
        aggregator.subscribe("fl/up/0/#")
        assert aggregator.publish("models/kept/release", b"newest", retain=True) < 128
    with Peer(fleet, fleet.device("dev-1")) as device:
        assert device.publish(f"fl/up/0/dev-1/{UPDATE}/head", b"waits") < 128
    broker.stop()
    broker.start()
    with Peer(fleet, fleet.aggregator, clean=False) as aggregator:
        assert aggregator.session_present
        assert aggregator.fence() == [(f"fl/up/0/dev-1/{UPDATE}/head", b"waits")]
    with Peer(fleet, fleet.device("dev-1")) as device:
        device.subscribe("models/kept/release")
        assert device.fence() == [("models/kept/release", b"newest")]
    with Peer(fleet, fleet.aggregator) as aggregator:
        aggregator.publish("models/kept/release", b"", retain=True)


def test_more_than_a_thousand_updates_wait(fleet: Fleet) -> None:
    """No count limits what waits for an aggregator that is away (mosquitto's own limit drops the 1,001st)."""
    with Peer(fleet, fleet.aggregator, clean=False) as aggregator:
        aggregator.subscribe("fl/up/0/#")
    with Peer(fleet, fleet.device("dev-1")) as device:
        for number in range(1200):
            assert device.publish(f"fl/up/0/dev-1/{UPDATE}/head", b"%d" % number) < 128
    with Peer(fleet, fleet.aggregator, clean=False) as aggregator:
        found: list[bytes] = []
        while fresh := aggregator.fence():
            found += [payload for _, payload in fresh]
    assert found == [b"%d" % number for number in range(1200)]
    with Peer(fleet, fleet.aggregator):
        pass


def test_packet_limit_is_announced(fleet: Fleet) -> None:
    """CONNACK tells a limit that leaves room for a message of 64 MiB."""
    with Peer(fleet, fleet.device("dev-1")) as device:
        assert device.packet_max == (64 << 20) + (128 << 10)


# -- topics ------------------------------------------------------------------------------------------------------


def _everybody(fleet: Fleet) -> dict[str, Identity]:
    return {
        "device": fleet.device("dev-1"),
        "other": fleet.device("dev-2"),
        "operator": fleet.operator,
        "aggregator": fleet.aggregator,
    }


WRITERS = {
    "models/release": {"operator", "aggregator"},
    "models/digits/release": {"aggregator"},
    "models/digits/round": {"aggregator"},
    "models/release/deeper": set(),
    "models/digits/other": set(),
    f"fl/up/0/dev-1/{UPDATE}/head": {"device"},
    f"fl/up/7/dev-1/{UPDATE}/0": {"device"},
    "fl/dev/dev-1/status": {"device"},
    "fl/dev/dev-1/cmd/receipt": {"aggregator"},
    "fl/dev/dev-1/other": set(),
    "fl/agg/0/status": {"aggregator"},
    "fl/agg/1/status": set(),
    "fl/blob/00ff/0": {"operator", "aggregator"},
    "fl/root/2": {"operator", "aggregator"},
    "elsewhere": set(),
    "$SYS/broker/version": set(),
}
READERS = {
    "models/release": {"device", "other", "operator", "aggregator"},
    "models/digits/release": {"device", "other", "operator", "aggregator"},
    "models/digits/round": {"device", "other", "operator", "aggregator"},
    f"fl/up/0/dev-1/{UPDATE}/head": {"aggregator"},
    f"fl/up/7/dev-1/{UPDATE}/0": set(),
    "fl/dev/dev-1/status": {"operator", "aggregator"},
    "fl/dev/dev-1/cmd/receipt": {"device"},
    "fl/agg/0/status": {"device", "other", "operator", "aggregator"},
    "fl/blob/00ff/0": {"device", "other", "operator", "aggregator"},
    "fl/root/2": {"device", "other", "operator", "aggregator"},
}


@pytest.mark.parametrize("topic", WRITERS)
def test_who_may_write(fleet: Fleet, topic: str) -> None:
    """Exactly the writers of the protocol's table may write a topic; everybody else is told so (reason 135)."""
    allowed = set()
    for who, identity in _everybody(fleet).items():
        with Peer(fleet, identity) as peer:
            code = peer.publish(topic, who.encode())
            assert code < 128 or code == NOT_AUTHORIZED
            if code < 128:
                allowed.add(who)
    assert allowed == WRITERS[topic]


@pytest.mark.parametrize("topic", READERS)
def test_who_may_read(fleet: Fleet, topic: str) -> None:
    """What its writer publishes reaches exactly the readers of the table, however wide they subscribe."""
    with ExitStack() as stack:
        peers = {who: stack.enter_context(Peer(fleet, identity)) for who, identity in _everybody(fleet).items()}
        for peer in peers.values():
            assert peer.subscribe("#") < 128
            assert peer.subscribe(topic) < 128
            peer.fence()
        writer = min(WRITERS[topic])
        assert peers[writer].publish(topic, b"news") < 128
        assert {who for who, peer in peers.items() if (topic, b"news") in peer.fence()} == READERS[topic]


def test_refused_writes_are_not_delivered(fleet: Fleet) -> None:
    """What a device may not write reaches nobody, retained or not: reason 135 is no mere word."""
    forbidden = ["models/release", "models/digits/release", "models/digits/round", "fl/agg/0/status", "fl/root/2"]
    forbidden += [f"fl/up/0/dev-2/{UPDATE}/head", "fl/dev/dev-2/status", "fl/dev/dev-2/cmd/receipt"]
    with Peer(fleet, fleet.aggregator) as aggregator, Peer(fleet, fleet.device("dev-2")) as victim:
        for peer in (aggregator, victim):
            peer.subscribe("#")
            peer.fence()
        for topic in forbidden:
            for retain in (False, True):
                assert _publish(fleet, fleet.device("dev-1"), topic, b"evil", retain) == NOT_AUTHORIZED, topic
        assert aggregator.fence() == victim.fence() == []
    with Peer(fleet, fleet.aggregator) as late:
        late.subscribe("#")
        assert b"evil" not in [payload for _, payload in late.fence()]


def test_a_will_obeys_the_acl(fleet: Fleet) -> None:
    """A device's last word reaches its own status, and no release topic."""
    device = fleet.device("dev-1")
    with Peer(fleet, fleet.aggregator) as aggregator:
        for topic in ("models/release", "fl/dev/dev-1/status", "models/digits/round", "fl/dev/dev-1/status"):
            aggregator.subscribe(topic)
        aggregator.fence()
        for topic in ("models/release", "fl/dev/dev-1/status", "models/digits/round", "fl/dev/dev-1/status"):
            try:
                peer = Peer(fleet, device, will=Will(topic, topic.encode()))
            except Refused:
                continue
            # A second connection ends the first, whose will is out before the second is in.
            with peer, Peer(fleet, device):
                pass
        assert [topic for topic, _ in aggregator.fence()] == ["fl/dev/dev-1/status", "fl/dev/dev-1/status"]


# -- names that would abuse the patterns -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["+", "#", "+/dev-1", "a+b", "dev-1/#"])
def test_wildcards_in_a_name(fleet: Fleet, tmp_path: Path, name: str) -> None:
    """Should somebody make our CA sign such a name, it writes and reads nothing of others."""
    identity = _forged(fleet, tmp_path, name)
    with Peer(fleet, fleet.device("dev-1")) as victim, Peer(fleet, fleet.aggregator) as aggregator:
        for peer in (victim, aggregator):
            peer.subscribe("#")
            peer.fence()
        with Peer(fleet, identity) as attacker:
            attacker.subscribe("#")
            attacker.fence()
            aggregator.publish("fl/dev/dev-1/cmd/receipt", b"secret")
            assert attacker.fence() == []
        for topic in ("fl/dev/dev-1/status", "fl/dev/dev-1/cmd/status", f"fl/up/0/dev-1/{UPDATE}/head"):
            assert _publish(fleet, identity, topic, b"evil") == NOT_AUTHORIZED, topic
        assert [payload for _, payload in victim.fence()] == [b"secret"]
        assert aggregator.fence() == []


@pytest.mark.parametrize("name", ["dev-1/cmd", f"dev-1/{UPDATE}", "+", "#", "_agg-0/x", "", "Dev-1", "dev_1"])
def test_no_such_name_is_issued(fleet: Fleet, name: str) -> None:
    """Names with a slash are the one thing that the ACL cannot hold off, so the CA signs none."""
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(ConfigError, match="beginning with a letter"):
        ca.issue_client(ca.open_authority(fleet.folder, None), name, key, NOW, timedelta(days=30))


@pytest.mark.parametrize("name", ["_agg-1", "_aggregator", "_broker", "_operator2", "models", "release", "up", "0"])
def test_a_service_or_topic_word_as_a_name(fleet: Fleet, tmp_path: Path, name: str) -> None:
    """A name that the ACL does not list is a device at most, even one that sounds like a service or a topic."""
    identity = _forged(fleet, tmp_path, name)
    forbidden = ["models/release", f"models/{name}/release", f"models/{name}/round", f"fl/agg/{name}/status"]
    for topic in (*forbidden, f"fl/up/0/dev-1/{UPDATE}/head"):
        assert _publish(fleet, identity, topic, b"evil") == NOT_AUTHORIZED, topic
    assert _publish(fleet, identity, f"fl/dev/{name}/status", b"own") < 128


def test_no_device_is_named_like_a_service(fleet: Fleet, tmp_path: Path) -> None:
    """The command that makes bundles refuses every name that the ACL lists, so only the CA's key could make one."""
    acl = (fleet.folder / "broker" / "acl").read_text().splitlines()
    services = [line.removeprefix("user ") for line in acl if line.startswith("user ")]
    assert sorted(services) == ["_agg-0", "_operator"]
    for name in services:
        with pytest.raises(ConfigError, match="beginning with a letter"):
            ca.add_device(fleet.folder, name, tmp_path / "bundle", now=time.time(), passphrase=None)
