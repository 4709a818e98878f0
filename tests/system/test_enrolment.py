"""A device and the registrar, both real: how it joins, renews and is turned away, and what is left when that fails."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from aggregator.broker import Broker, free_port
from edge_agent import cli, config, control, enrol, renewal
from shared import identity
from shared.enrolment import Token
from shared.errors import ConfigError, EnrolmentError, LinkError, Refused
from tests.hostile.daemon import Daemon, until
from tests.hostile.field import POLICY
from tests.registrar import HOST, Site
from tests.registrar import site as make_site

pytestmark = pytest.mark.system
GENEROUS = {"LIMITS__ADDRESS_BURST": "100000", "LIMITS__ADDRESS_CONNECTIONS": "24"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A registrar for the tests of this module."""
    with make_site(tmp_path_factory.mktemp("site"), **GENEROUS) as made:
        yield made


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """Where a device keeps its configuration."""
    (tmp_path / "etc").mkdir()
    return tmp_path / "etc" / "agent.toml"


def url(site: Site) -> str:
    """The registrar's address."""
    return f"https://{HOST}:{site.port}"


def join(site: Site, etc: Path, token: Token, *options: str) -> int:
    """`edge-agent enrol`; its exit code."""
    return cli.main(["enrol", url(site), str(token), "--config", str(etc), *options])


def serial(etc: Path) -> int:
    """Of the certificate that a device has."""
    return identity.load_certificate(etc.with_name("device.crt")).serial_number


# -- joining ---------------------------------------------------------------------------------------------------------


def test_a_device_joins(site: Site, etc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One command writes all that the agent needs; the key is for its owner alone and never left the device."""
    assert join(site, etc, site.token("pump-1"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["device"] == "pump-1"
    names = {path.name for path in etc.parent.iterdir()}
    assert names == {"agent.toml", "agent.toml.d", "ca.crt", "device.crt", "device.key", "root.msgpack"}
    assert etc.with_name("device.key").stat().st_mode & 0o777 == 0o600
    found = config.load(etc, {})
    assert (found.broker.host, found.broker.port, found.enrol.url) == (HOST, 18_883, url(site))
    assert cli.main(["config", "check", "--config", str(etc)]) == 0
    assert renewal.choose(found, time.time()).name == "pump-1"
    shown = site.ask(verb="device show", name="pump-1")
    assert len(shown["certificates"]) == 1


def test_the_owners_configuration_stays(site: Site, etc: Path) -> None:
    """What is in agent.toml is not touched; the fleet's settings come as a drop-in beside it."""
    mine = "# mine\n[policy]\nmains = false\n"
    etc.write_text(mine)
    assert join(site, etc, site.token("pump-2")) == 0
    assert etc.read_text() == mine and config.load(etc, {}).policy.mains is False


def test_once_and_never_over_an_identity(site: Site, etc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A device that has an identity keeps it unless it is told --again; a token that was used is refused."""
    first = site.token("pump-3")
    assert join(site, etc, first) == 0
    before = serial(etc)
    assert join(site, etc, site.token("pump-3", again=True)) == 1
    assert "--again" in capsys.readouterr().err
    assert join(site, etc, first, "--again") == 3
    assert "token_used" in capsys.readouterr().err and serial(etc) == before
    assert join(site, etc, site.token("pump-3", again=True), "--again") == 0
    assert serial(etc) != before


def test_an_answer_that_was_lost(site: Site, etc: Path) -> None:
    """The disk refused after the registrar had said yes: nothing is half there, and the same command ends well."""
    token = site.token("pump-4")
    blocked = etc.with_name("agent.toml.d")
    blocked.write_text("in the way")
    assert join(site, etc, token) == 78
    assert {path.name for path in etc.parent.iterdir()} == {"agent.toml.d", ".device.key.enrolling"}
    blocked.unlink()
    assert join(site, etc, token) == 0
    assert len(site.ask(verb="device show", name="pump-4")["certificates"]) == 1
    assert not etc.with_name(".device.key.enrolling").exists()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--name", "other"], 3, "wrong_name"),
        (["--name", "a/b"], 3, "name"),
        (["--name", "_agg-0"], 3, "name"),
    ],
)
def test_names_that_are_refused(
    site: Site, etc: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, words: str
) -> None:
    """A token's name is not the device's to choose, and a service's never is."""
    assert join(site, etc, site.token("pump-5"), *options) == code
    assert words in capsys.readouterr().err
    assert not etc.exists() and not etc.with_name("device.key").exists()


def test_another_fleets_registrar(site: Site, etc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One whose CA is not the token's gets no secret: the token is still good afterwards."""
    token = site.token("pump-6")
    forged = Token(token.id, token.secret, bytes(32))
    refused = len(site.events("enrolment.refused"))
    assert join(site, etc, forged) == 3
    assert "wrong_pin" in capsys.readouterr().err
    assert len(site.events("enrolment.refused")) == refused
    assert join(site, etc, token) == 0


@pytest.mark.parametrize(
    ("where", "token", "code", "words"),
    [
        ("http://localhost", "ff1.x", 2, "https://HOST"),
        ("https://localhost/path", "ff1.x", 2, ""),
        ("https://localhost", "junk", 2, "not a join token"),
    ],
)
def test_wrong_usage(
    etc: Path, capsys: pytest.CaptureFixture[str], where: str, token: str, code: int, words: str
) -> None:
    """A wrong address or token is told in one line, and the token is not repeated."""
    assert cli.main(["enrol", where, token, "--config", str(etc)]) == code
    err = capsys.readouterr().err
    assert words in err and "junk" not in err and err.count("\n") == 1


def test_nobody_there(site: Site, etc: Path) -> None:
    """5, as for every daemon that cannot be reached."""
    token = site.token("pump-7")
    assert cli.main(["enrol", f"https://{HOST}:{free_port()}", str(token), "--config", str(etc)]) == 5


def test_a_clock_in_1970(site: Site, etc: Path) -> None:
    """A device without a clock joins; one whose clock is beyond the registrar's certificate is told so."""
    assert enrol.enrol(etc, url(site), site.token("pump-8"), "", again=False, clock=lambda: 0.0) == "pump-8"
    with pytest.raises(LinkError, match="clock"):
        enrol.enrol(etc, url(site), site.token("pump-9"), "", again=True, clock=lambda: 4e9)


def test_a_system_clock_that_is_behind(tmp_path: Path, etc: Path) -> None:
    """A board whose clock says 1970 joins, though the registrar's certificate has not begun yet by OpenSSL's clock."""
    with make_site(tmp_path / "site", 18_883, 400 * 86_400.0, **GENEROUS) as made:
        assert join(made, etc, made.token("pump-1")) == 0


def test_renewal_is_of_the_same_fleet(site: Site, etc: Path) -> None:
    """The old key's word is needed, and a certificate of another key or name is not taken."""
    assert join(site, etc, site.token("pump-10")) == 0
    mine = renewal.choose(config.load(etc, {}), time.time())
    where = enrol.place(url(site), time.time)
    authority = identity.load_certificates(etc.with_name("ca.crt"))[0].public_bytes(Encoding.DER)
    new = identity.load_key(etc.with_name("device.key"))
    from tests.registrar import new_key

    found = enrol.renew(where, authority, "pump-10", mine.der, mine.key, new_key())
    assert found != mine.der
    with pytest.raises(EnrolmentError) as caught:
        enrol.renew(where, authority, "pump-10", mine.der, new_key(), new_key())
    assert caught.value.reason is Refused.BAD_SIGNATURE and new is not None


# -- living with it --------------------------------------------------------------------------------------------------


class Life:
    """A fleet with a broker and a registrar that gives certificates of a few seconds, and an agent that enrolled."""

    def __init__(self, site: Site, broker: Broker, folder: Path, name: str) -> None:
        self.site, self.broker = site, broker
        self.etc = folder / "etc" / "agent.toml"
        self.etc.parent.mkdir(parents=True)
        self.etc.write_text(f'[device]\nstate_dir = "state"\nrun_dir = "run"\n{POLICY}\n[enrol]\nretry = 1.0\n')
        assert join(site, self.etc, site.token(name)) == 0
        self.daemon = Daemon("edge_agent", self.etc)

    def status(self) -> dict[str, Any]:
        """What `edge-agent status` shows."""
        return control.ask(self.etc.parent / "run", control.Request("status"))

    def connected(self) -> bool | None:
        """Whether its link is up."""
        connected: bool = self.status()["link"]["connected"]
        return connected or None


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Broker]]:
    """Certificates live for 12 s, and 30 s longer for renewal."""
    folder, port = tmp_path_factory.mktemp("short"), free_port()
    lives = {"CERTIFICATES__LIFETIME": "12", "CERTIFICATES__RENEWABLE": "60"}
    with make_site(folder, port, **GENEROUS, **lives) as made, Broker(made.fleet / "broker", port) as broker:
        yield made, broker


def test_renewed_while_it_runs(short: tuple[Site, Broker], tmp_path: Path) -> None:
    """Before its end the agent has a new key and certificate, connects anew with it, and does so again and again."""
    life = Life(*short, tmp_path, "dev-1")
    with life.daemon as daemon:
        daemon.start()
        daemon.wait("link.up")
        first = serial(life.etc)
        for _ in range(2):
            start = len(daemon.lines)
            daemon.wait("certificate.renewed", start)
            daemon.wait("link.up", start)
        kept = life.etc.parent / "state" / renewal.FILE
        assert kept.stat().st_mode & 0o777 == 0o600
        assert identity.load_certificate(kept).serial_number != first == serial(life.etc)
        until(life.connected, "the link")
        shown = life.status()["certificate"]
        assert shown["source"] == "renewed" and shown["renews"]
        assert not [line for line in daemon.read() if line["event"] == "renewal.failed"]
        assert daemon.stop() == 0


def test_slept_past_its_end(short: tuple[Site, Broker], tmp_path: Path) -> None:
    """A device that was off when its certificate ended asks with its old key, and is back without anybody's help."""
    site, _ = short
    life = Life(*short, tmp_path, "dev-2")
    ends = identity.load_certificate(life.etc.with_name("device.crt")).not_valid_after_utc.timestamp()
    until(lambda: time.time() > ends + 1 or None, "the certificate's end")
    with life.daemon as daemon:
        daemon.start()
        daemon.wait("certificate.renewed")
        daemon.wait("link.up")
        late = [line for line in site.events("device.renewed") if line["device"] == "dev-2"]
        assert late
        daemon.kill()
        # Killed hard, it comes back with what it had renewed.
        start = len(daemon.read())
        daemon.start()
        daemon.wait("link.up", start)


def test_denied(short: tuple[Site, Broker], tmp_path: Path) -> None:
    """A revoked device gets no new certificate, says why and works on."""
    site, _ = short
    life = Life(*short, tmp_path, "dev-3")
    (site.home / "deny.txt").write_text("dev-3\n")
    with life.daemon as daemon:
        daemon.start()
        failed = daemon.wait("renewal.failed")
        assert failed["reason"] in ("denied", "revoked") and daemon.pid
        daemon.stop(signal.SIGTERM)
    (site.home / "deny.txt").write_text("")


def test_a_registrar_that_is_away(short: tuple[Site, Broker], tmp_path: Path) -> None:
    """The agent works on and asks again, until it is there."""
    site, _ = short
    life = Life(*short, tmp_path, "dev-4")
    assert site.stop() == 0
    try:
        with life.daemon as daemon:
            daemon.start()
            daemon.wait("link.up")
            assert daemon.wait("renewal.failed")["reason"] == "unreachable"
            site.start()
            daemon.wait("certificate.renewed")
            daemon.stop()
    finally:
        if site.process is None:
            site.start()


def test_a_damaged_renewal(short: tuple[Site, Broker], tmp_path: Path) -> None:
    """A renewed identity that is not whole, or of another device, is not used: the configured one is."""
    site, _ = short
    life = Life(*short, tmp_path, "dev-5")
    found = config.load(life.etc, {})
    kept = found.device.state_dir / renewal.FILE
    kept.parent.mkdir()
    other = Life(*short, tmp_path / "other", "dev-6")
    theirs = other.etc.with_name("device.key").read_bytes() + other.etc.with_name("device.crt").read_bytes()
    mixed = other.etc.with_name("device.key").read_bytes() + life.etc.with_name("device.crt").read_bytes()
    for content in (b"", b"junk", theirs, mixed, theirs[: len(theirs) // 2]):
        kept.write_bytes(content)
        assert renewal.choose(found, time.time()).source == "configured"
    assert site.process is not None


def test_nothing_configured(tmp_path: Path) -> None:
    """A device that never joined says which file is missing."""
    (tmp_path / "agent.toml").write_text('[broker]\nhost = "localhost"\n')
    with pytest.raises(ConfigError, match=r"device\.crt|ca\.crt"):
        renewal.choose(config.load(tmp_path / "agent.toml", os.environ), 0.0)
