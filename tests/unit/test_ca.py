"""aggregator.ca and aggregator.broker: a fleet's folder and the bundles out of it."""

import errno
import stat
import subprocess
import sys
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from aggregator import broker, ca
from shared import identity, signing, wire
from shared.errors import ConfigError
from shared.messages import Role, Root, Signed

BORN = datetime(2027, 1, 1, tzinfo=UTC)
NOW = BORN.timestamp()
SECRET = b"correct horse"

TREE = {
    "aggregator/agg-0.crt": 0o644,
    "aggregator/agg-0.key": 0o600,
    "aggregator/aggregator.toml": 0o644,
    "aggregator/ca.crt": 0o644,
    "aggregator/root.msgpack": 0o644,
    "aggregator/signing.key": 0o600,
    "aggregator/signing.pub": 0o644,
    "broker/acl": 0o600,
    "broker/ca.crt": 0o644,
    "broker/mosquitto.conf": 0o644,
    "broker/server.crt": 0o644,
    "broker/server.key": 0o600,
    "ca/ca.crt": 0o644,
    "ca/ca.key": 0o600,
    "fleet.toml": 0o644,
    "operator/ca.crt": 0o644,
    "operator/operator.crt": 0o644,
    "operator/operator.key": 0o600,
    "publisher/publisher.key": 0o600,
    "root/root.key": 0o600,
    "root/root.msgpack": 0o644,
}
BUNDLE = {"agent.toml": 0o644, "ca.crt": 0o644, "device.crt": 0o644, "device.key": 0o600, "root.msgpack": 0o644}


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet whose keys are under a passphrase."""
    made = tmp_path_factory.mktemp("ca") / "fleet"
    ca.init_fleet(
        made, "acme", ["broker.example", "192.0.2.7"], now=NOW, passphrase=SECRET, port=8884, prefix="acme/fl"
    )
    return made


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    """A fleet of the test's own, with open keys."""
    ca.init_fleet(tmp_path / "fleet", "acme", ["broker.example"], now=NOW, passphrase=None)
    return tmp_path / "fleet"


def _modes(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()
    }


# -- init --------------------------------------------------------------------------------------------------------


def test_the_tree(sealed: Path) -> None:
    """Every file has its place, and nobody but the owner reads a key or looks into a folder."""
    assert _modes(sealed) == TREE
    for folder in (sealed, *(path for path in sealed.rglob("*") if path.is_dir())):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_which_keys_are_encrypted(sealed: Path) -> None:
    """The passphrase is on what the operator keeps, and not on what daemons must read by themselves."""
    encrypted = {name for name in TREE if name.endswith(".key") and identity.is_encrypted(sealed / name)}
    assert encrypted == {"ca/ca.key", "root/root.key", "publisher/publisher.key"}
    identity.load_signing_key(sealed / "root" / "root.key", SECRET)
    identity.load_signing_key(sealed / "publisher" / "publisher.key", SECRET)


def test_the_root_record(sealed: Path) -> None:
    """The root is signed by its own key and names the publisher; aggregator and devices pin the same bytes."""
    data = (sealed / "root" / "root.msgpack").read_bytes()
    signed = wire.unpack(data, Signed)
    root_key = signing.public_bytes(identity.load_signing_key(sealed / "root" / "root.key", SECRET))
    root = signing.verify(signed, Root, Role.ROOT, [root_key])
    publisher = identity.load_signing_key(sealed / "publisher" / "publisher.key", SECRET)
    assert root.fleet == "acme"
    assert root.version == 1
    assert root.root_keys == [root_key]
    assert [entry.key for entry in root.publishers] == [signing.public_bytes(publisher)]
    assert root.expires == (BORN + timedelta(days=3650)).timestamp()
    assert root.publishers[0].expires == (BORN + timedelta(days=1825)).timestamp()
    assert (sealed / "aggregator" / "root.msgpack").read_bytes() == data


def test_the_signing_key(sealed: Path) -> None:
    """The public half of the aggregator's key lies beside it, for the publisher's manifests."""
    private = identity.load_signing_key(sealed / "aggregator" / "signing.key")
    assert identity.load_signing_public(sealed / "aggregator" / "signing.pub") == signing.public_bytes(private)


@pytest.mark.parametrize(
    ("path", "name"),
    [("operator/operator", "_operator"), ("aggregator/agg-0", "_agg-0"), ("broker/server", "_broker")],
)
def test_services(sealed: Path, path: str, name: str) -> None:
    """Services are named so that no device can be, their keys fit, and they are valid from two days before."""
    certificate = identity.load_certificate(sealed / f"{path}.crt")
    assert identity.common_name(certificate) == name
    assert identity.load_key(sealed / f"{path}.key").public_key() == certificate.public_key()
    assert certificate.not_valid_before_utc == BORN - timedelta(days=2)
    assert certificate.not_valid_after_utc == BORN + timedelta(days=1095)
    with pytest.raises(ConfigError, match="beginning with a letter"):
        ca.add_device(sealed, name, sealed / "bundle", now=NOW, passphrase=SECRET)


def test_the_brokers_names(sealed: Path) -> None:
    """The broker's certificate is good for every name and address given, and for its own machine."""
    certificate = identity.load_certificate(sealed / "broker" / "server.crt")
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["broker.example", "localhost"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7", "127.0.0.1", "::1"]


def test_without_loopback(tmp_path: Path) -> None:
    """The broker's certificate can be kept from being good for localhost."""
    ca.init_fleet(tmp_path / "fleet", "acme", ["broker.example"], now=NOW, passphrase=None, loopback=False)
    certificate = identity.load_certificate(tmp_path / "fleet" / "broker" / "server.crt")
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.DNSName("broker.example")]


def test_strict_openssl(sealed: Path, tmp_path: Path) -> None:
    """OpenSSL's strict rules, which newer Pythons turn on, like every certificate."""
    ca.add_device(sealed, "dev-1", tmp_path / "dev-1", now=NOW, passphrase=SECRET)
    for file, purpose in (
        (sealed / "aggregator" / "agg-0.crt", "sslclient"),
        (tmp_path / "dev-1" / "device.crt", "sslclient"),
        (sealed / "broker" / "server.crt", "sslserver"),
    ):
        command = ["openssl", "verify", "-x509_strict", "-attime", str(int(NOW)), "-purpose", purpose, "-CAfile"]
        done = subprocess.run([*command, sealed / "ca" / "ca.crt", file], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_serial_numbers(fleet: Path, tmp_path: Path) -> None:
    """Serial numbers are random: a deny list and a CRL mean one certificate."""
    for number in range(20):
        ca.add_device(fleet, f"dev-{number}", tmp_path / f"dev-{number}", now=NOW, passphrase=None)
    serials = {identity.load_certificate(path).serial_number for path in (fleet / "devices").glob("*.crt")}
    assert len(serials) == 20
    assert min(serials) > 1 << 64


def test_nothing_outlives_the_authority(tmp_path: Path) -> None:
    """A certificate ends with the CA at the latest."""
    days = ca.Days(ca=10, service=100)
    ca.init_fleet(tmp_path / "fleet", "acme", ["localhost"], now=NOW, passphrase=None, days=days)
    authority = identity.load_certificate(tmp_path / "fleet" / "ca" / "ca.crt")
    assert authority.not_valid_after_utc == BORN + timedelta(days=10)
    ca.add_device(tmp_path / "fleet", "dev-1", tmp_path / "dev-1", now=NOW, passphrase=None)
    for file in ("fleet/aggregator/agg-0.crt", "fleet/broker/server.crt", "dev-1/device.crt"):
        assert identity.load_certificate(tmp_path / file).not_valid_after_utc == authority.not_valid_after_utc
    with pytest.raises(ConfigError, match="has expired"):
        late = (BORN + timedelta(days=11)).timestamp()
        ca.add_device(tmp_path / "fleet", "dev-2", tmp_path / "dev-2", now=late, passphrase=None)


def test_init_never_overwrites(fleet: Path) -> None:
    """A second init leaves the first fleet as it is."""
    before = {path: path.read_bytes() for path in fleet.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="never overwritten"):
        ca.init_fleet(fleet, "acme", ["broker.example"], now=NOW, passphrase=None)
    assert {path: path.read_bytes() for path in fleet.rglob("*") if path.is_file()} == before


def test_init_takes_an_empty_folder(tmp_path: Path) -> None:
    """A folder that somebody made beforehand is used, and is private afterwards."""
    (tmp_path / "fleet").mkdir(mode=0o755)
    ca.init_fleet(tmp_path / "fleet", "acme", ["broker.example"], now=NOW, passphrase=None)
    assert stat.S_IMODE((tmp_path / "fleet").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "Acme"}, "fleet: name"),
        ({"name": ""}, "fleet: name"),
        ({"hosts": []}, "fleet: host"),
        ({"hosts": ["a b"]}, "fleet: host"),
        ({"hosts": ['a"\n[x]']}, "fleet: host"),
        ({"port": 0}, "fleet: port"),
        ({"port": 70_000}, "fleet: port"),
        ({"passphrase": b""}, "fleet: passphrase"),
        ({"prefix": "models"}, "broker: prefix"),
        ({"prefix": "models/fl"}, "broker: prefix"),
        ({"prefix": "fl/+"}, "broker: prefix"),
        ({"prefix": "$SYS"}, "broker: prefix"),
        ({"prefix": "fl\nuser x"}, "broker: prefix"),
        ({"broker_user": "a b"}, "broker: user"),
        ({"bind": "0.0.0.0\nallow_anonymous true"}, "broker: bind"),
        ({"broker_home": PurePosixPath("/etc/x\nallow_anonymous true")}, "absolute path"),
        ({"broker_home": PurePosixPath("etc")}, "absolute path"),
        ({"days": ca.Days(service=0)}, "fleet: days"),
    ],
)
def test_bad_wishes(tmp_path: Path, change: dict[str, object], words: str) -> None:
    """What cannot be is refused before anything is made, naming what is wrong."""
    wish = {"name": "acme", "hosts": ["broker.example"], "now": NOW, "passphrase": None} | change
    with pytest.raises(ConfigError, match=words):
        ca.init_fleet(tmp_path / "fleet", **wish)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be(tmp_path: Path) -> None:
    """A file in the way is the operator's to mend, and nothing is left behind."""
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "fleet"):
        with pytest.raises(ConfigError):
            ca.init_fleet(place, "acme", ["broker.example"], now=NOW, passphrase=None)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_configuration(sealed: Path) -> None:
    """The rendered files say where they lie, the port and the prefix, and leave no hole."""
    conf = (sealed / "broker" / "mosquitto.conf").read_text()
    acl = (sealed / "broker" / "acl").read_text()
    assert "@{" not in conf + acl
    assert conf.count("\nlistener ") == 1
    assert "\nlistener 8884\n" in conf
    assert f"\nacl_file {sealed}/broker/acl\n" in conf
    rules = [line for line in acl.splitlines() if line and not line.startswith("#")]
    topics = [line.split(" ", 2)[2] for line in rules if not line.startswith("user ")]
    assert {topic.split("/")[0] for topic in topics} == {"models", "acme", "$SYS"}


def test_where_the_broker_will_be(tmp_path: Path) -> None:
    """The broker's configuration can be made for another machine."""
    ca.init_fleet(
        tmp_path / "fleet",
        "acme",
        ["broker.example"],
        now=NOW,
        passphrase=None,
        bind="192.0.2.7",
        broker_home=PurePosixPath("/etc/mosquitto/fieldfare"),
        broker_data=PurePosixPath("/var/lib/mosquitto"),
        broker_user="mosquitto",
    )
    conf = (tmp_path / "fleet" / "broker" / "mosquitto.conf").read_text()
    for line in (
        "listener 8883 192.0.2.7",
        "certfile /etc/mosquitto/fieldfare/server.crt",
        "persistence_location /var/lib/mosquitto/",
        "user mosquitto",
    ):
        assert f"\n{line}\n" in conf
    assert str(tmp_path) not in conf


def test_the_fleet_is_remembered(sealed: Path, tmp_path: Path) -> None:
    """What bundles need is read back from the folder; a damaged note is named."""
    found = ca.read_fleet(sealed)
    assert found == ca.Fleet(
        name="acme",
        hosts=["broker.example", "192.0.2.7"],
        port=8884,
        prefix="acme/fl",
        message_max=broker.MESSAGE_MAX,
    )
    with pytest.raises(ConfigError, match="aggregator fleet init"):
        ca.read_fleet(tmp_path)
    for text in ("name = 1", "[", "", (sealed / "fleet.toml").read_text() + "surprise = 1\n"):
        (tmp_path / "fleet.toml").write_text(text)
        with pytest.raises(ConfigError, match="not valid any more"):
            ca.read_fleet(tmp_path)


# -- bundles -----------------------------------------------------------------------------------------------------


def test_a_bundle(sealed: Path, tmp_path: Path) -> None:
    """A bundle holds all that a device needs, and its certificate is the device's."""
    out = ca.add_device(sealed, "dev-7", tmp_path / "bundle", now=NOW, passphrase=SECRET, days=90)
    assert _modes(out) == BUNDLE
    certificate = identity.load_certificate(out / "device.crt")
    der = certificate.public_bytes(Encoding.DER)
    found = identity.verify_device(der, identity.load_certificates(out / "ca.crt"), NOW)
    assert found.name == "dev-7"
    assert found.not_after == (BORN + timedelta(days=90)).timestamp()
    assert identity.load_key(out / "device.key").public_key() == found.public_key
    assert (out / "root.msgpack").read_bytes() == (sealed / "root" / "root.msgpack").read_bytes()
    assert (sealed / "devices" / "dev-7.crt").read_bytes() == (out / "device.crt").read_bytes()


@pytest.mark.parametrize("ending", [".tar.gz", ".tgz"])
def test_an_archive(sealed: Path, tmp_path: Path, ending: str) -> None:
    """The same as one file, private, with one folder in it and nobody's numbers."""
    name = "dev-archived" + ending.replace(".", "-")
    out = ca.add_device(sealed, name, tmp_path / f"bundle{ending}", now=NOW, passphrase=SECRET)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    with tarfile.open(out) as archive:
        entries = archive.getmembers()
        assert {entry.name: entry.mode for entry in entries if entry.isfile()} == {
            f"{name}/{file}": mode for file, mode in BUNDLE.items()
        }
        assert {(entry.uid, entry.gid, entry.uname) for entry in entries} == {(0, 0, "")}
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_the_agents_configuration(sealed: Path, tmp_path: Path) -> None:
    """The agent takes its bundle's configuration as it is, and so does the aggregator."""
    from aggregator import config as aggregator_config
    from edge_agent import config as agent_config

    out = ca.add_device(sealed, "dev-8", tmp_path / "bundle", now=NOW, passphrase=SECRET)
    agent = agent_config.load(out / "agent.toml", {})
    assert (agent.broker.host, agent.broker.port, agent.broker.prefix) == ("broker.example", 8884, "acme/fl")
    assert agent.device.name == "dev-8"
    assert agent.broker.key == out / "device.key"
    # The commented example is right too once the operator takes the marks away.
    text = (out / "agent.toml").read_text()
    (out / "agent.toml").write_text(
        "\n".join(line.removeprefix("#") if "=" in line or "[" in line else line for line in text.splitlines())
    )
    assert agent_config.load(out / "agent.toml", {}).data["digits"].format == "npz"
    found = aggregator_config.load(sealed / "aggregator" / "aggregator.toml")
    assert (found.broker.host, found.broker.port, found.broker.prefix) == ("broker.example", 8884, "acme/fl")
    assert Path(found.trust.signing_key) == sealed / "aggregator" / "signing.key"


@pytest.mark.parametrize("name", ["Dev", "_operator", "_agg-0", "a/b", "+", "#", "", "-a", "a" * 64, "dev\n", "../x"])
def test_names_that_no_device_has(fleet: Path, tmp_path: Path, name: str) -> None:
    """A name outside the pattern makes nothing."""
    with pytest.raises(ConfigError, match="device: name"):
        ca.add_device(fleet, name, tmp_path / "bundle", now=NOW, passphrase=None)
    assert not (tmp_path / "bundle").exists()
    assert list((fleet / "devices").iterdir()) == []


def test_a_second_certificate(fleet: Path, tmp_path: Path) -> None:
    """A device gets another certificate only when asked for, and the record keeps both."""
    ca.add_device(fleet, "dev-1", tmp_path / "one", now=NOW, passphrase=None)
    with pytest.raises(ConfigError, match="has a certificate already"):
        ca.add_device(fleet, "dev-1", tmp_path / "two", now=NOW, passphrase=None)
    assert not (tmp_path / "two").exists()
    ca.add_device(fleet, "dev-1", tmp_path / "two", now=NOW, passphrase=None, again=True)
    issued = (fleet / "devices" / "dev-1.crt").read_bytes()
    assert issued == (tmp_path / "one" / "device.crt").read_bytes() + (tmp_path / "two" / "device.crt").read_bytes()


def test_a_bundle_never_overwrites(fleet: Path, tmp_path: Path) -> None:
    """What lies at the bundle's place stays, and no certificate is issued."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file.tar.gz").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in ("full", "file.tar.gz", "link"):
        with pytest.raises(ConfigError, match="never overwritten"):
            ca.add_device(fleet, "dev-1", tmp_path / place, now=NOW, passphrase=None)
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file.tar.gz").read_text() == "mine"
    assert list((fleet / "devices").iterdir()) == []


def test_the_wrong_passphrase(sealed: Path, tmp_path: Path) -> None:
    """Without the passphrase there is no bundle and no record."""
    for passphrase, words in ((None, "give its passphrase"), (b"wrong", "this passphrase")):
        with pytest.raises(ConfigError, match=words):
            ca.add_device(sealed, "dev-9", tmp_path / "bundle", now=NOW, passphrase=passphrase)
    assert list(tmp_path.iterdir()) == []
    assert not (sealed / "devices" / "dev-9.crt").exists()


def test_a_failure_part_way(fleet: Path, tmp_path: Path) -> None:
    """When a part is missing nothing half-made stays, neither bundle nor record, and a later try works."""
    away = tmp_path / "away"
    (fleet / "root" / "root.msgpack").rename(away)
    for place in ("bundle", "bundle.tar.gz"):
        with pytest.raises(ConfigError, match=r"root\.msgpack"):
            ca.add_device(fleet, "dev-1", tmp_path / place, now=NOW, passphrase=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["away", "fleet"]
    assert list((fleet / "devices").iterdir()) == []
    away.rename(fleet / "root" / "root.msgpack")
    ca.add_device(fleet, "dev-1", tmp_path / "bundle", now=NOW, passphrase=None)


def test_a_failure_at_the_end(fleet: Path, tmp_path: Path) -> None:
    """A record that cannot be written keeps the bundle from being handed out."""
    (fleet / "devices" / "dev-1.new").mkdir()  # where the record is written first
    with pytest.raises(ConfigError, match="cannot be made"):
        ca.add_device(fleet, "dev-1", tmp_path / "bundle", now=NOW, passphrase=None)
    assert [path.name for path in tmp_path.iterdir()] == ["fleet"]
    assert not (fleet / "devices" / "dev-1.crt").exists()


def test_a_full_disk(fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the system fails at the very last step the record is as it was before."""
    ca.add_device(fleet, "dev-1", tmp_path / "one", now=NOW, passphrase=None)
    before = (fleet / "devices" / "dev-1.crt").read_bytes()

    def full(path: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    for name, again in (("dev-1", True), ("dev-2", False)):
        with pytest.raises(ConfigError, match="No space left"):
            ca.add_device(fleet, name, tmp_path / "two", now=NOW, passphrase=None, again=again)
    assert (fleet / "devices" / "dev-1.crt").read_bytes() == before
    assert [path.name for path in (fleet / "devices").iterdir()] == ["dev-1.crt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fleet", "one"]


def test_keys_of_two_fleets(fleet: Path, sealed: Path, tmp_path: Path) -> None:
    """A CA's key beside another's certificate is noticed before anything is signed."""
    (fleet / "ca" / "ca.crt").write_bytes((sealed / "ca" / "ca.crt").read_bytes())
    with pytest.raises(ConfigError, match="not the key of"):
        ca.add_device(fleet, "dev-1", tmp_path / "bundle", now=NOW, passphrase=None)


def test_days_of_a_device(fleet: Path, tmp_path: Path) -> None:
    """A certificate that ends before it begins is not made."""
    with pytest.raises(ConfigError, match="device: days"):
        ca.add_device(fleet, "dev-1", tmp_path / "bundle", now=NOW, passphrase=None, days=0)


# -- where it runs -----------------------------------------------------------------------------------------------


def test_imports_everywhere() -> None:
    """The operator's machine may be a Mac or a PC: no module of Unix alone, no torch, no numpy at import."""
    script = (
        "import sys\n"
        "for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios', 'syslog', 'torch', 'numpy', 'sqlalchemy'):\n"
        "    sys.modules[name] = None\n"
        "import aggregator.ca, aggregator.broker, shared.identity\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
