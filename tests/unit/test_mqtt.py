"""shared.mqtt without a broker: TLS, and how long a link waits. Everything else runs in tests/broker/test_link.py."""

import ssl
from pathlib import Path

from paho.mqtt.client import ConnectFlags, DisconnectFlags
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from aggregator import ca
from shared import mqtt
from shared.driver import Mailbox


def test_tls_1_3_and_the_fleets_authority_alone(tmp_path: Path) -> None:
    """A link speaks TLS 1.3 or not at all, checks the broker's name, and trusts no authority of the system."""
    ca.init_fleet(tmp_path / "fleet", "acme", ["broker.example"], now=1_800_000_000.0, passphrase=None)
    folder = tmp_path / "fleet" / "aggregator"
    context = mqtt.tls(folder / "ca.crt", folder / "agg-0.crt", folder / "agg-0.key")
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    authorities = context.get_ca_certs()
    assert len(authorities) == 1 and "acme" in str(authorities)


def link(tmp_path: Path) -> tuple[mqtt.Link, Mailbox[mqtt.LinkEvent]]:
    """A link of a fleet that has no broker, and its mailbox."""
    ca.init_fleet(tmp_path / "fleet", "acme", ["broker.example"], now=1_800_000_000.0, passphrase=None)
    folder = tmp_path / "fleet" / "aggregator"
    box: Mailbox[mqtt.LinkEvent] = Mailbox()
    keys = (folder / "ca.crt", folder / "agg-0.crt", folder / "agg-0.key")
    return mqtt.Link(mqtt.LinkSettings("broker.example", 1, "_agg-0", *keys), box), box


def test_a_session_taken_over(tmp_path: Path) -> None:
    """Told that another client has our name, a link waits its longest before it throws that one out, and says why."""
    one, box = link(tmp_path)
    assert one._client._reconnect_min_delay <= 1.5
    for _ in range(5):
        one._on_connect(None, None, ConnectFlags(False), ReasonCode(PacketTypes.CONNACK, "Success"), None)
        told = ReasonCode(PacketTypes.DISCONNECT, identifier=142)
        one._on_disconnect(None, None, DisconnectFlags(True), told, None)
        assert box.take(0.0)[-1] == mqtt.LinkDown("another client has connected as _agg-0")
        assert one._client._reconnect_min_delay >= 15.0
    one._on_connect(None, None, ConnectFlags(False), ReasonCode(PacketTypes.CONNACK, "Success"), None)
    assert one._client._reconnect_min_delay <= 1.5
