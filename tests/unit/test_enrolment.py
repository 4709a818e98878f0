"""shared.enrolment: tokens read back exactly, requests are strict and bounded, only holders of keys are believed."""

import base64
from datetime import datetime
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from shared import enrolment
from shared.enrolment import BODY_MAX, EnrolRequest, Refusal, RenewRequest, Token
from shared.errors import EnrolmentError, Refused

KEY = ec.generate_private_key(ec.SECP256R1())
OTHER = ec.generate_private_key(ec.SECP256R1())
TOKEN = Token("abcdefgh", bytes(range(32)), bytes(range(100, 132)))


def request(**changes: object) -> bytes:
    """An enrol request as a device sends it, with some fields changed."""
    good = {"v": 1, "token": "abcdefgh", "secret": base64.b64encode(bytes(32)).decode(), "name": "a", "csr": "x"}
    return msgspec.json.encode(good | changes)


@given(st.text("abcdefghijklmnopqrstuvwxyz234567", min_size=8, max_size=32), st.binary(min_size=16, max_size=64))
def test_a_token_reads_back(name: str, secret: bytes) -> None:
    """Text and token are the same thing, and the text survives blanks around it."""
    token = Token(name, secret, bytes(32))
    assert Token.parse(f" {token}\n") == token


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ff1",
        str(TOKEN)[:-1],
        str(TOKEN) + "A",
        str(TOKEN).replace("ff1", "ff2"),
        str(TOKEN).replace("abcdefgh", "ABCDEFGH"),
        f"ff1.abcdefgh.{'A' * 20}.{'A' * 43}",
        f"ff1.abcdefgh.{'A' * 87}.{'A' * 43}",
        f"ff1.abcdefgh.{'A' * 22}.{'A' * 42}B",
    ],
)
def test_a_damaged_token_is_not_repeated(text: str) -> None:
    """What is no token gives advice, never the secret that may be in it."""
    with pytest.raises(ValueError, match="is not a join token") as caught:
        Token.parse(text)
    assert "AAAA" not in str(caught.value)


def test_a_secret_is_in_no_representation() -> None:
    """A token or request that lands in a log or traceback shows no secret."""
    found = enrolment.decode(request(), EnrolRequest)
    assert str(TOKEN).split(".")[2] not in repr(TOKEN) and repr(TOKEN.secret) not in repr(TOKEN)
    assert "secret" not in repr(found) and repr(found.secret) not in repr(found)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"{}",
        b"[" * 5000,
        b"\xff",
        request(v=2),
        request(token="../x"),
        request(secret="AA=="),
        request(secret="!"),
        request(name=7),
        request(name="x" * 254),
        request(csr=""),
        request(csr="x" * 7000),
        request(more=1),
    ],
)
def test_what_is_no_request_is_refused(body: bytes) -> None:
    """Other types, sizes, versions and unknown fields: one typed refusal."""
    with pytest.raises(EnrolmentError) as caught:
        enrolment.decode(body, EnrolRequest)
    assert caught.value.reason is Refused.BAD_REQUEST


def test_a_large_body_is_not_parsed() -> None:
    """The size is judged first."""
    with pytest.raises(EnrolmentError) as caught:
        enrolment.decode(b" " * (BODY_MAX + 1), EnrolRequest)
    assert caught.value.reason is Refused.TOO_LARGE


@given(st.binary(max_size=300))
def test_no_body_crashes(body: bytes) -> None:
    """Whatever comes, it is a message or an EnrolmentError."""
    for kind in (EnrolRequest, RenewRequest, Refusal):
        try:
            enrolment.decode(body, kind)
        except EnrolmentError:
            continue


@pytest.mark.parametrize("name", [None, "sensor-1"])
def test_a_request_proves_its_key(name: str | None) -> None:
    """What make_csr makes is read back with its key and name."""
    found = enrolment.read_csr(enrolment.make_csr(KEY, name))
    assert (found.public_key, found.name) == (KEY.public_key(), name)


def bad_requests() -> dict[str, str]:
    """Certificate requests that must not be believed."""
    builder = x509.CertificateSigningRequestBuilder()
    one = x509.NameAttribute(NameOID.COMMON_NAME, "a")
    der = bytearray(builder.subject_name(x509.Name([one])).sign(KEY, hashes.SHA256()).public_bytes(Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM).decode()
    large = rsa.generate_private_key(65_537, 2048)
    unit = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "b")

    def pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, *attributes: x509.NameAttribute[str]) -> str:
        made = builder.subject_name(x509.Name(attributes)).sign(key, hashes.SHA256())
        return made.public_bytes(Encoding.PEM).decode()

    return {
        "junk": "junk",
        "not ascii": "\u20ac",
        "forged": forged,
        "rsa": pem(large, one),
        "p384": pem(ec.generate_private_key(ec.SECP384R1()), one),
        "two names": pem(KEY, one, one),
        "more than a name": pem(KEY, one, unit),
    }


@pytest.mark.parametrize("what", bad_requests())
def test_a_bad_request_is_refused(what: str) -> None:
    """Another algorithm, another signer or another subject: a typed refusal."""
    with pytest.raises(EnrolmentError) as caught:
        enrolment.read_csr(bad_requests()[what])
    assert caught.value.reason is Refused.BAD_CSR


def test_a_renewal_is_signed_by_the_old_key_for_this_request() -> None:
    """Neither another key nor another request, nor the bare request's signature, will do."""
    csr = enrolment.make_csr(OTHER, "a")
    read = enrolment.read_csr(csr)
    signature = enrolment.sign_renewal(KEY, csr)
    enrolment.verify_renewal(KEY.public_key(), read, signature)
    bare = KEY.sign(read.der, ec.ECDSA(hashes.SHA256()))
    another = enrolment.read_csr(enrolment.make_csr(KEY, "a"))
    for public, what, proof in (
        (OTHER.public_key(), read, signature),
        (KEY.public_key(), another, signature),
        (KEY.public_key(), read, bare),
        (KEY.public_key(), read, b"junk"),
    ):
        with pytest.raises(EnrolmentError) as caught:
            enrolment.verify_renewal(public, what, proof)
        assert caught.value.reason is Refused.BAD_SIGNATURE


def certificate() -> x509.Certificate:
    """Any certificate."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fleet")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(KEY.public_key())
    builder = builder.serial_number(1).not_valid_before(datetime(2026, 1, 1)).not_valid_after(datetime(2036, 1, 1))
    return builder.sign(KEY, hashes.SHA256())


def test_only_the_pinned_ca_is_believed() -> None:
    """What is no certificate, or another one than the pin's, is WRONG_PIN."""
    found = certificate()
    pem, pin = found.public_bytes(Encoding.PEM), enrolment.pin_of(found)
    assert enrolment.pinned_ca(pem, pin) == found
    for sent, pinned in ((pem, bytes(32)), (b"", pin), (b"junk", pin), (b"\xff", pin), (pem[:-200], pin)):
        with pytest.raises(EnrolmentError) as caught:
            enrolment.pinned_ca(sent, pinned)
        assert caught.value.reason is Refused.WRONG_PIN


def test_every_refusal_has_its_advice() -> None:
    """docs/howto/enrol.md says what to do about each word that a registrar may answer."""
    page = (Path(__file__).parents[2] / "docs/howto/enrol.md").read_text()
    assert [each.value for each in Refused if f"`{each.value}`" not in page] == []
