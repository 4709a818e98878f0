"""shared.identity: only what the fleet's CA gave a device is a device, and only its key signs its heads."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtensionOID
from hypothesis import given
from hypothesis import strategies as st

from aggregator import ca
from shared import identity, signing
from shared.errors import ConfigError, Reason, RemoteProtocolError
from tests.forgery import CLIENT, SERVER, Forged, forge

BORN = datetime(2027, 1, 1, tzinfo=UTC)
AT = (BORN + timedelta(days=3)).timestamp()
DAY = 86_400.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet's folder."""
    made = tmp_path_factory.mktemp("identity") / "fleet"
    ca.init_fleet(made, "acme", ["broker.example"], now=BORN.timestamp(), passphrase=None)
    return made


@pytest.fixture(scope="module")
def authority(folder: Path) -> ca.Authority:
    """The fleet's CA."""
    return ca.open_authority(folder, None)


def _refused(der: bytes, authority: ca.Authority, at: float = AT) -> str:
    with pytest.raises(RemoteProtocolError) as caught:
        identity.verify_device(der, [authority.certificate], at)
    assert caught.value.reason is Reason.BAD_CERTIFICATE
    return caught.value.detail


# -- certificates ------------------------------------------------------------------------------------------------


def test_a_device_of_the_fleet(authority: ca.Authority) -> None:
    """A certificate that the CA issued gives its name, key, end and serial number."""
    key = ec.generate_private_key(ec.SECP256R1())
    issued = ca.issue_client(authority, "dev-1", key.public_key(), BORN, timedelta(days=30))
    found = identity.verify_device(issued.public_bytes(Encoding.DER), [authority.certificate], AT)
    assert found.name == "dev-1"
    assert found.public_key == key.public_key()
    assert found.not_after == (BORN + timedelta(days=30)).timestamp()
    assert found.serial == issued.serial_number


def test_a_certificate_of_another_time(authority: ca.Authority) -> None:
    """Only the date stands against it: that says as much of a clock. Against a forged one, more does."""
    for born in (BORN, BORN + timedelta(days=200)):
        der = forge(authority, "dev-1", born=born, days=30).der
        assert identity.was_or_will_be(der, [authority.certificate])
        _refused(der, authority, AT + 100 * DAY)
    assert not identity.was_or_will_be(forge(authority, "dev-1", usage=[SERVER]).der, [authority.certificate])
    assert not identity.was_or_will_be(b"junk" * 100, [authority.certificate])


def test_one_of_several_authorities(authority: ca.Authority, tmp_path: Path) -> None:
    """While a fleet changes its CA, certificates of both are good."""
    ca.init_fleet(tmp_path / "next", "acme", ["broker.example"], now=BORN.timestamp(), passphrase=None)
    following = ca.open_authority(tmp_path / "next", None)
    both = [authority.certificate, following.certificate]
    for issuer in (authority, following):
        assert identity.verify_device(forge(issuer, "dev-1", born=BORN).der, both, AT).name == "dev-1"


@pytest.mark.parametrize(
    ("days", "valid"), [(-0.001, False), (0.001, True), (29.999, True), (30.001, False), (-3650, False), (2500, False)]
)
def test_dates(authority: ca.Authority, days: float, valid: bool) -> None:
    """A certificate counts from its first to its last moment, by the time that is asked about."""
    der = forge(authority, "dev-1", born=BORN, days=30).der
    at = BORN.timestamp() + days * DAY
    if valid:
        assert identity.verify_device(der, [authority.certificate], at).name == "dev-1"
    else:
        assert "not valid at validation time" in _refused(der, authority, at)


def test_an_expired_authority(authority: ca.Authority) -> None:
    """A certificate does not outlive the CA, even if it says so."""
    der = forge(authority, "dev-1", born=BORN, days=9000).der
    assert "not valid" in _refused(der, authority, (BORN + timedelta(days=5000)).timestamp())


def test_forged_authority_of_the_same_name(authority: ca.Authority, tmp_path: Path) -> None:
    """It is the CA's key that counts, not what it is called."""
    ca.init_fleet(tmp_path / "forged", "acme", ["broker.example"], now=BORN.timestamp(), passphrase=None)
    other = ca.open_authority(tmp_path / "forged", None)
    assert other.certificate.subject == authority.certificate.subject
    assert "signature" in _refused(forge(other, "dev-1", born=BORN).der, authority)


def test_a_device_is_no_authority(authority: ca.Authority) -> None:
    """A device cannot issue for another with its own key."""
    thief = forge(authority, "thief", born=BORN)
    assert isinstance(thief.key, ec.EllipticCurvePrivateKey)
    _refused(forge(ca.Authority(thief.certificate, thief.key), "dev-1", born=BORN).der, authority)


def test_the_authority_is_no_device(authority: ca.Authority) -> None:
    """The CA's own certificate, and one that may issue, name nobody."""
    assert "basicConstraints" in _refused(authority.certificate.public_bytes(Encoding.DER), authority)
    assert "basicConstraints" in _refused(forge(authority, "dev-1", born=BORN, ca=True).der, authority)


@pytest.mark.parametrize("usage", [[], [SERVER], [CLIENT, SERVER], [x509.ObjectIdentifier("2.5.29.37.0")]])
def test_usage(authority: ca.Authority, usage: list[x509.ObjectIdentifier]) -> None:
    """A certificate for a server, for anything, or for nothing in particular is not a device's."""
    _refused(forge(authority, "dev-1", born=BORN, usage=usage).der, authority)


def test_the_brokers_certificate(folder: Path, authority: ca.Authority) -> None:
    """The real server certificate of the fleet is not a device's."""
    server = identity.load_certificate(folder / "broker" / "server.crt")
    assert "EKU" in _refused(server.public_bytes(Encoding.DER), authority)


@pytest.mark.parametrize(
    "name", ["_agg-0", "_operator", "Dev-1", "dev_1", "dev.1", "-dev", "a+b", "#", "+", "dev-1/cmd", "dev 1", "a" * 64]
)
def test_names(authority: ca.Authority, name: str) -> None:
    """Services, wildcards, slashes and all else that the protocol's pattern does not match is not a device's name."""
    assert "cannot name a device" in _refused(forge(authority, name, born=BORN).der, authority)


def test_a_trailing_line_break(authority: ca.Authority) -> None:
    """The pattern means the whole name."""
    _refused(forge(authority, "dev-1\n", born=BORN, alternative=[x509.DNSName("dev-1")]).der, authority)


@pytest.mark.parametrize("names", [["dev-1", "dev-2"], ["dev-1", "dev-1"]])
def test_several_common_names(authority: ca.Authority, names: list[str]) -> None:
    """The broker takes one of several names; we take none."""
    forged = forge(authority, "dev-1", born=BORN, common_names=names)
    assert "2 common names" in _refused(forged.der, authority)


@pytest.mark.parametrize(
    "alternative",
    [
        [x509.DNSName("dev-2")],
        [x509.DNSName("dev-1"), x509.DNSName("dev-2")],
        [x509.UniformResourceIdentifier("dev-1")],
        [],
    ],
)
def test_alternative_name(authority: ca.Authority, alternative: list[x509.GeneralName]) -> None:
    """The alternative name is the common name and nothing more."""
    _refused(forge(authority, "dev-1", born=BORN, alternative=alternative).der, authority)


@pytest.mark.parametrize(
    ("oid", "value"),
    [
        (ExtensionOID.SUBJECT_ALTERNATIVE_NAME, "3004a3020500"),  # an X.400 address, which no library reads
        (ExtensionOID.SUBJECT_ALTERNATIVE_NAME, "6a756e6b"),
        (ExtensionOID.CRL_DISTRIBUTION_POINTS, "30"),
    ],
)
def test_malformed_extensions(authority: ca.Authority, oid: x509.ObjectIdentifier, value: str) -> None:
    """An extension that cannot be read is the same error as all else, even under the CA's signature."""
    more: list[x509.ExtensionType] = [x509.UnrecognizedExtension(oid, bytes.fromhex(value))]
    alternative: list[x509.GeneralName] | None = [] if oid == ExtensionOID.SUBJECT_ALTERNATIVE_NAME else None
    _refused(forge(authority, "dev-1", born=BORN, alternative=alternative, more=more).der, authority)


@pytest.mark.parametrize(
    "key", [lambda: ec.generate_private_key(ec.SECP384R1()), lambda: rsa.generate_private_key(65537, 2048)]
)
def test_other_keys(authority: ca.Authority, key: Callable[[], ec.EllipticCurvePrivateKey]) -> None:
    """Heads are signed with P-256, so a certificate for another kind of key is of no use."""
    assert "P-256" in _refused(forge(authority, "dev-1", born=BORN, key=key()).der, authority)


def test_size(authority: ca.Authority) -> None:
    """A certificate beyond 4 KiB is not parsed."""
    assert "the limit is 4096" in _refused(bytes(5000), authority)


@given(st.binary(max_size=300))
def test_junk(authority: ca.Authority, junk: bytes) -> None:
    """Any bytes give the one documented error."""
    _refused(junk, authority)


@pytest.fixture(scope="module")
def good(authority: ca.Authority) -> Forged:
    """One good certificate."""
    return forge(authority, "dev-1", born=BORN)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_every_flipped_bit(authority: ca.Authority, good: Forged) -> None:
    """No flipped bit gives another device, and no flipped bit of what the CA signed gives any."""
    signed = len(good.certificate.tbs_certificate_bytes) + 4
    for bit in range(len(good.der) * 8):
        der = bytearray(good.der)
        der[bit // 8] ^= 1 << bit % 8
        try:
            found = identity.verify_device(bytes(der), [authority.certificate], AT)
        except RemoteProtocolError as error:
            assert error.reason is Reason.BAD_CERTIFICATE
        else:
            # The unused bits of the signature's bit string say nothing and are not signed.
            assert bit // 8 >= signed
            assert (found.name, found.public_key) == ("dev-1", good.key.public_key())


# -- heads -------------------------------------------------------------------------------------------------------


def test_a_head(good: Forged) -> None:
    """What a device signs verifies under its certificate's key."""
    assert isinstance(good.key, ec.EllipticCurvePrivateKey)
    signature = identity.sign_head(good.key, b"head")
    assert len(decode_dss_signature(signature)) == 2
    identity.verify_head(good.key.public_key(), b"head", signature)


@given(st.binary(max_size=80), st.data())
def test_another_head(good: Forged, head: bytes, data: st.DataObject) -> None:
    """A changed head, key or signature does not verify, whatever it looks like."""
    assert isinstance(good.key, ec.EllipticCurvePrivateKey)
    signature = identity.sign_head(good.key, head)
    other = data.draw(st.binary(max_size=80).filter(lambda text: text != head))
    junk = data.draw(st.binary(max_size=80).filter(lambda text: text != signature))
    stranger = ec.generate_private_key(ec.SECP256R1()).public_key()
    public = good.key.public_key()
    for key, text, mark in ((public, other, signature), (public, head, junk), (stranger, head, signature)):
        with pytest.raises(RemoteProtocolError) as caught:
            identity.verify_head(key, text, mark)
        assert caught.value.reason is Reason.BAD_SIGNATURE


def test_a_head_is_nothing_else(good: Forged) -> None:
    """A signature by the device's key over the bare bytes is not one over a head (a handshake signs such bytes)."""
    assert isinstance(good.key, ec.EllipticCurvePrivateKey)
    signature = good.key.sign(b"head", identity._ECDSA)
    with pytest.raises(RemoteProtocolError, match="bad_signature"):
        identity.verify_head(good.key.public_key(), b"head", signature)
    good.key.public_key().verify(
        identity.sign_head(good.key, b"head"), b"fieldfare/v1/head\0head", identity._ECDSA
    )  # the frozen form


# -- files -------------------------------------------------------------------------------------------------------


def _private(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, passphrase: bytes | None = None) -> bytes:
    encryption = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def test_keys_are_read_back(tmp_path: Path) -> None:
    """Both kinds of private key come back from their file, open or under a passphrase."""
    path = tmp_path / "key"
    for passphrase in (None, b"secret"):
        ecdsa, signer = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()
        path.write_bytes(_private(ecdsa, passphrase))
        assert identity.is_encrypted(path) is (passphrase is not None)
        assert identity.load_key(path, passphrase).private_numbers() == ecdsa.private_numbers()
        path.write_bytes(_private(signer, passphrase))
        assert signing.public_bytes(identity.load_signing_key(path, passphrase)) == signing.public_bytes(signer)


def test_a_passphrase_that_is_not_needed(tmp_path: Path) -> None:
    """An open key opens with a passphrase too: the command line asks before it knows."""
    (tmp_path / "key").write_bytes(_private(ec.generate_private_key(ec.SECP256R1())))
    identity.load_key(tmp_path / "key", b"secret")


def test_the_wrong_passphrase(tmp_path: Path) -> None:
    """No passphrase and the wrong one are told apart."""
    (tmp_path / "key").write_bytes(_private(ec.generate_private_key(ec.SECP256R1()), b"secret"))
    with pytest.raises(ConfigError, match="give its passphrase"):
        identity.load_key(tmp_path / "key")
    with pytest.raises(ConfigError, match="that this passphrase opens"):
        identity.load_key(tmp_path / "key", b"sesame")


def test_the_wrong_file(tmp_path: Path, good: Forged) -> None:
    """Each loader names the file, what it holds and what belongs there."""
    signer = ed25519.Ed25519PrivateKey.generate()
    public = signer.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    wide = ec.generate_private_key(ec.SECP384R1())
    path = tmp_path / "file"
    cases: list[tuple[bytes, Callable[[Path], object], str]] = [
        (_private(signer), identity.load_key, "not an ECDSA P-256 key"),
        (_private(wide), identity.load_key, "not an ECDSA P-256 key"),
        (good.key_pem, identity.load_signing_key, "not an Ed25519 key"),
        (good.pem, identity.load_key, "does not hold"),
        (b"junk", identity.load_signing_key, "does not hold"),
        (good.key_pem, identity.load_certificates, "does not hold PEM certificates"),
        (b"", identity.load_certificates, "does not hold PEM certificates"),
        (good.pem + good.pem, identity.load_certificate, "holds 2 certificates"),
        (good.key_pem, identity.load_signing_public, "does not hold"),
    ]
    for data, load, words in cases:
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=words) as caught:
            load(path)
        assert caught.value.path == str(path)
    path.write_bytes(public)
    assert identity.load_signing_public(path) == signing.public_bytes(signer)
    path.write_bytes(good.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(ConfigError, match=r"name the \.pub file"):
        identity.load_signing_public(path)


def test_the_root_record(folder: Path, tmp_path: Path) -> None:
    """The pinned root comes back from its file; a file that is not one, or was changed, is named."""
    path = tmp_path / "root.msgpack"
    data = (folder / "root" / "root.msgpack").read_bytes()
    path.write_bytes(data)
    assert identity.load_root(path).fleet == "acme"
    for damaged in (b"", b"text", data[:-1], data.replace(b"acme", b"acne")):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match="is not a fleet's root record") as caught:
            identity.load_root(path)
        assert caught.value.path == str(path)


def test_a_missing_file(tmp_path: Path) -> None:
    """A file that is not there gives its name and the command that makes it."""
    for load in (identity.load_certificates, identity.load_key, identity.load_signing_key):
        with pytest.raises(ConfigError, match="aggregator device add"):
            load(tmp_path / "absent")
