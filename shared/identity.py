"""Who a device is: its certificate checked against the fleet's CA, and its signature over an update's head.

Guarantee: a name that comes out of `verify_device` was given by the fleet's CA to the holder of `public_key`.
Revocation is not looked at here: the aggregator's deny list is. The loaders read a PEM file at start-up and blame it.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from shared import wire
from shared.errors import ConfigError, Reason, RemoteProtocolError
from shared.messages import Root, Signed
from shared.topics import is_name
from shared.trust import open_root

CERTIFICATE_MAX = 4096
"""Bytes of a certificate in DER that are parsed at all."""

_HEAD_DOMAIN = b"fieldfare/v1/head\0"
_ECDSA = ec.ECDSA(hashes.SHA256())

_MALFORMED = (
    ValueError,
    UnsupportedAlgorithm,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""Everything that parsing a hostile certificate raises in `cryptography`."""

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class VerifiedDevice:
    """What a valid certificate says. `not_after` is in seconds since 1970."""

    name: str
    public_key: ec.EllipticCurvePublicKey
    not_after: float
    serial: int


def verify_device(certificate: bytes, ca: Sequence[x509.Certificate], at: float) -> VerifiedDevice:
    """The device that `certificate` (DER) names, if one of `ca` issued it for a client and it is valid at `at`.

    `at` is in seconds since 1970. Raises RemoteProtocolError(BAD_CERTIFICATE), also for a service's certificate.
    """
    if len(certificate) > CERTIFICATE_MAX:
        raise _bad(f"{len(certificate)} bytes, the limit is {CERTIFICATE_MAX}")
    try:
        leaf = x509.load_der_x509_certificate(certificate)
        policy = PolicyBuilder().store(Store(list(ca))).time(datetime.fromtimestamp(at, UTC))
        policy.build_client_verifier().verify(leaf, [])
        name = _name(leaf)
        key = leaf.public_key()
    except VerificationError as error:
        raise _bad(str(error).partition(" (encountered")[0]) from None
    except _MALFORMED as error:
        raise _bad(f"{type(error).__name__}: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _bad("its key is not on P-256")
    return VerifiedDevice(name, key, leaf.not_valid_after_utc.timestamp(), leaf.serial_number)


def was_or_will_be(certificate: bytes, ca: Sequence[x509.Certificate]) -> bool:
    """Whether a certificate holds at its first or its last second, so that `verify_device` refuses only its date."""
    with contextlib.suppress(*_MALFORMED):
        leaf = x509.load_der_x509_certificate(certificate)
        for moment in (leaf.not_valid_before_utc, leaf.not_valid_after_utc):
            with contextlib.suppress(RemoteProtocolError):
                verify_device(certificate, ca, moment.timestamp())
                return True
    return False


def sign_head(private: ec.EllipticCurvePrivateKey, head: bytes) -> bytes:
    """The device's signature (ECDSA P-256 over SHA-256, DER) over the bytes of a head; it verifies as nothing else."""
    return private.sign(_HEAD_DOMAIN + head, _ECDSA)


def verify_head(public: ec.EllipticCurvePublicKey, head: bytes, signature: bytes) -> None:
    """Raises RemoteProtocolError(BAD_SIGNATURE) unless the holder of `public` signed exactly these bytes as a head."""
    try:
        public.verify(signature, _HEAD_DOMAIN + head, _ECDSA)
    except InvalidSignature:
        raise RemoteProtocolError(Reason.BAD_SIGNATURE, "an update's head under its certificate's key") from None


def common_name(certificate: x509.Certificate) -> str:
    """The one common name of a certificate, which the broker takes for the client's name; else ValueError."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1 or not isinstance(names[0].value, str):
        raise ValueError(f"{len(names)} common names where exactly one belongs")
    return names[0].value


def load_certificates(path: Path) -> list[x509.Certificate]:
    """Every certificate of a PEM file, at least one; raises ConfigError."""
    return _load(path, x509.load_pem_x509_certificates, "PEM certificates")


def load_certificate(path: Path) -> x509.Certificate:
    """The only certificate of a PEM file; raises ConfigError. `.public_bytes(Encoding.DER)` is what a head carries."""
    found = load_certificates(path)
    if len(found) != 1:
        raise ConfigError(str(path), "", f"holds {len(found)} certificates; leave only this client's own in it")
    return found[0]


def load_key(path: Path, passphrase: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    """The private key of a device, a service or the CA: PEM, P-256; raises ConfigError, also for a wrong passphrase."""
    key = _load_private(path, passphrase, "an ECDSA P-256 key")
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(str(path), "", f"holds {type(key).__name__}, not an ECDSA P-256 key")
    return key


def load_signing_key(path: Path, passphrase: bytes | None = None) -> ed25519.Ed25519PrivateKey:
    """A root's, publisher's or aggregator's private key; raises ConfigError, also for a wrong passphrase."""
    key = _load_private(path, passphrase, "an Ed25519 key")
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ConfigError(str(path), "", f"holds {type(key).__name__}, not an Ed25519 key")
    return key


def load_signing_public(path: Path) -> bytes:
    """The 32 raw bytes of an Ed25519 public key in a PEM file; raises ConfigError."""
    key = _load(path, serialization.load_pem_public_key, "an Ed25519 public key")
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise ConfigError(str(path), "", f"holds {type(key).__name__}, not an Ed25519 public key; name the .pub file")
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def load_root(path: Path) -> Root:
    """The fleet's root record that this machine pins; raises ConfigError."""
    try:
        return open_root(wire.unpack(_read(path), Signed, 1 << 20))
    except RemoteProtocolError as error:
        raise ConfigError(
            str(path), "", f"is not a fleet's root record ({error}); copy it again from the fleet folder"
        ) from None


def is_encrypted(path: Path) -> bool:
    """Whether a private key's file asks for a passphrase; raises ConfigError if it cannot be read."""
    return b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in _read(path)


def _name(leaf: x509.Certificate) -> str:
    name = common_name(leaf)
    if not is_name(name):
        raise _bad(f"{name!r:.80} cannot name a device")
    if list(leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value) != [x509.DNSName(name)]:
        raise _bad(f"its alternative name is not its common name {name}")
    # The verifier lets a certificate without this extension pass; our CA issues none.
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    if list(usage) != [ExtendedKeyUsageOID.CLIENT_AUTH]:
        raise _bad("it is not for a client alone")
    return name


def _load_private(path: Path, passphrase: bytes | None, what: str) -> object:
    encrypted = is_encrypted(path)
    if encrypted and passphrase is None:
        raise ConfigError(str(path), "", "is encrypted: give its passphrase")

    secret = passphrase if encrypted else None

    def parse(pem: bytes) -> object:
        return serialization.load_pem_private_key(pem, secret)

    return _load(path, parse, f"{what} that this passphrase opens" if secret else what)


def _load(path: Path, parse: Callable[[bytes], K], what: str) -> K:
    pem = _read(path)
    try:
        return parse(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(str(path), "", f"does not hold {what} ({str(error)[:100]})") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        advice = "`aggregator fleet init` and `aggregator device add` make these files"
        raise ConfigError(str(path), "", f"cannot be read: {error.strerror}; {advice}") from None


def _bad(detail: str) -> RemoteProtocolError:
    return RemoteProtocolError(Reason.BAD_CERTIFICATE, detail[:200])
