"""What `broker render` makes, in a real mosquitto; and a revoked device there, told by the registrar's list."""

import getpass
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import get_args

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from aggregator import broker, ca, cli
from aggregator.broker import Broker
from shared.enrolment import Enrolment
from shared.errors import ConfigError
from tests.broker.broker import Fleet, Identity, Peer, refusal
from tests.registrar import Site, new_key
from tests.registrar import site as make_site

# The options that mosquitto 2.0 and 2.1 have in common, of those that we use: from their manual pages.
KNOWN = """
    acl_file allow_anonymous autosave_interval cafile certfile connection_messages crlfile keyfile listener log_dest
    log_timestamp log_timestamp_format log_type max_inflight_messages max_packet_size max_queued_bytes
    max_queued_messages persistence persistence_location persistent_client_expiration queue_qos0_messages
    require_certificate set_tcp_nodelay sys_interval tls_version use_identity_as_username use_username_as_clientid
    user
"""
NEW = {"accept_protocol_versions"}
"""Since 2.1."""


def options(text: str) -> dict[str, str]:
    """What a mosquitto.conf sets."""
    lines = [line.partition(" ")[::2] for line in text.splitlines() if re.match("[a-z]", line)]
    return {key: value for key, value in lines if key != "log_type"}


@pytest.mark.parametrize("version", get_args(broker.Version))
@pytest.mark.parametrize("crl", [False, True])
def test_only_options_that_a_version_has(version: broker.Version, crl: bool) -> None:
    """What mosquitto does not know stops it: 2.0 gets nothing that came with 2.1."""
    home = PurePosixPath("/etc/mosquitto/fieldfare")
    settings = broker.Settings(home=home, data=PurePosixPath("/var/lib/mosquitto"), version=version, crl=crl)
    found = options(broker.render(settings)["mosquitto.conf"])
    assert set(found) - set(KNOWN.split()) == (NEW if version == "2.1" else set())
    assert ("crlfile" in found) is crl
    # 2.1 would choose 2,000,000.
    assert int(found["max_packet_size"]) > broker.MESSAGE_MAX
    assert found.get("crlfile", f"{home}/ca.crl") == f"{home}/ca.crl"


def test_the_units(tmp_path: Path) -> None:
    """The drop-in runs this configuration with descriptors enough; the list's units come only with a list."""
    home = PurePosixPath("/etc/mosquitto/fieldfare")
    settings = broker.Settings(home=home, data=PurePosixPath("/var/lib/mosquitto"))
    (drop_in,) = broker.render_units(settings).values()
    assert f"ExecStart=\nExecStart=/usr/sbin/mosquitto -c {home}/mosquitto.conf\n" in drop_in
    assert "LimitNOFILE=65536\n" in drop_in and "ca.crl" not in drop_in
    units = broker.render_units(settings, PurePosixPath("/var/lib/fieldfare-registrar/ca.crl"))
    assert set(units) == {"mosquitto.service.d/fieldfare.conf", "fieldfare-crl.path", "fieldfare-crl.service"}
    assert "PathChanged=/var/lib/fieldfare-registrar/ca.crl\n" in units["fieldfare-crl.path"]
    for path in ("/a b", "/a%h", "/a\nb", "relative"):
        with pytest.raises(ConfigError):
            broker.render_units(settings, PurePosixPath(path))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A registrar and the fleet that it is for."""
    with make_site(tmp_path_factory.mktemp("site")) as made:
        yield made


@pytest.fixture
def rendered(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Fleet]:
    """The fleet's broker as `broker render` makes it, running, with the registrar's list."""
    home, data = tmp_path / "broker", tmp_path / "data"
    data.mkdir()
    # Everything as on a host, but for the port.
    command = ["broker", "render", "--fleet", str(site.fleet), "-o", str(home), "--home", str(home)]
    command += ["--data", str(data), "--user", getpass.getuser(), "--bind", "127.0.0.1"]
    assert cli.main([*command, "--crl", str(site.state / "ca.crl")]) == 0
    assert "fieldfare-crl.path" in capsys.readouterr().out
    assert (home / "server.key").stat().st_mode & 0o777 == 0o600
    port = broker.free_port()
    conf = home / "mosquitto.conf"
    conf.write_text(conf.read_text().replace("listener 18883", f"listener {port}"))
    (home / "ca.crl").write_bytes((site.state / "ca.crl").read_bytes())
    fleet = Fleet(site.fleet, tmp_path / "bundles", Broker(home, port))
    fleet.broker.start()
    yield fleet
    fleet.broker.kill()


def enrolled(site: Site, folder: Path, name: str) -> Identity:
    """A device that enrolled with a token."""
    key = new_key()
    answer = site.enrol(site.token(name), key)
    assert isinstance(answer, Enrolment)
    found = Identity(folder / f"{name}.crt", folder / f"{name}.key")
    found.certificate.write_text(answer.certificate)
    found.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return found


def test_the_broker_turns_a_revoked_device_away(site: Site, rendered: Fleet, tmp_path: Path) -> None:
    """An enrolled device gets in; revoked, and the list read again, it gets no further, and others still do."""
    stolen, honest = enrolled(site, tmp_path, "stolen"), enrolled(site, tmp_path, "honest")
    for each in (stolen, honest, rendered.operator):
        with Peer(rendered, each) as peer:
            assert peer.is_up()
    assert cli.main(["device", "revoke", "stolen", "--config", str(site.home / "registrar.toml")]) == 0
    # What fieldfare-crl.service does.
    (rendered.broker.home / "ca.crl").write_bytes((site.state / "ca.crl").read_bytes())
    assert rendered.broker.pid is not None
    os.kill(rendered.broker.pid, signal.SIGHUP)
    end = time.monotonic() + 10
    while b"Reloading config" not in rendered.broker.log.read_bytes() and time.monotonic() < end:
        time.sleep(0.02)
    assert "revoked" in refusal(rendered, stolen)
    for each in (honest, rendered.operator, rendered.aggregator):
        with Peer(rendered, each) as peer:
            assert peer.is_up()


def test_rendering_overwrites_nothing(site: Site, tmp_path: Path) -> None:
    """As every command that makes a folder."""
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ConfigError, match="never overwritten"):
        ca.render_broker(site.fleet, tmp_path, home=tmp_path, data=tmp_path, user="mosquitto")
