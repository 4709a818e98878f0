"""shared.mqtt without a broker: how the link's TLS is set up. Everything else runs in tests/broker/test_link.py."""

import ssl
from pathlib import Path

from aggregator import ca
from shared import mqtt


def test_tls_1_3_and_the_fleets_authority_alone(tmp_path: Path) -> None:
    """A link speaks TLS 1.3 or not at all, checks the broker's name, and trusts no authority of the system."""
    ca.init_fleet(tmp_path / "fleet", "acme", ["broker.example"], now=1_800_000_000.0, passphrase=None)
    folder = tmp_path / "fleet" / "aggregator"
    context = mqtt.tls(folder / "ca.crt", folder / "agg-0.crt", folder / "agg-0.key")
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    authorities = context.get_ca_certs()
    assert len(authorities) == 1 and "acme" in str(authorities)
