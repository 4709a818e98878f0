"""What a device and the registrar say to each other: the join token, the JSON of each request and answer, the proofs.

    GET  /v1/ca     -> the fleet's CA as PEM; a device believes it if its digest is the token's pin
    POST /v1/enrol  EnrolRequest -> Enrolment    once for each token; again for the same key, because answers get lost
    POST /v1/renew  RenewRequest -> Enrolment    the old key signs the request, so an expired certificate will do
    anything else, and every refusal -> Refusal, with a status of 400 or more

Decoding is strict and bounded, and nothing here reads a clock, a disk or a source of randomness. A private key never
crosses the wire: the signature of a certificate request proves that its sender holds the new key.
"""

import base64
import binascii
import hmac
import re
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Annotated, Literal, Self, TypeVar

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from shared.errors import EnrolmentError, Refused
from shared.messages import Uint, Wire

CA_PATH, ENROL_PATH, RENEW_PATH = "/v1/ca", "/v1/enrol", "/v1/renew"
PORT = 8443
"""Where a registrar listens unless told otherwise."""
BODY_MAX = 16 << 10
"""Bytes of one request or answer; a longer one is not read. Root records are a few hundred."""
PEM_MAX = 6 << 10
SECRET_MIN, SECRET_MAX = 16, 64

BACKDATED = 2 * 86_400
"""Seconds from the beginning of a certificate's validity to its making: a clock that was without power is behind."""

_RENEW_DOMAIN = b"fieldfare/v1/renew\0"
_ECDSA = ec.ECDSA(hashes.SHA256())
_ID = r"[a-z2-7]{8,32}"
_TOKEN = re.compile(rf"ff1\.(?P<id>{_ID})\.(?P<secret>[A-Za-z0-9_-]{{22,86}})\.(?P<pin>[A-Za-z0-9_-]{{43}})")
_MALFORMED = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion)

W = TypeVar("W", bound=Wire)


# -- the token -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Token:
    """A join token as the operator hands it out: `ff1.<id>.<secret>.<pin>`, the last two in base64url."""

    id: str
    secret: bytes = field(repr=False)
    pin: bytes
    """sha256 of the fleet CA's certificate in DER."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """The token that `text` is; ValueError says what is wrong with it and never repeats it."""
        found = _TOKEN.fullmatch(text.strip())
        if found is None and text.strip().startswith("ff1."):
            raise ValueError("is not a join token: it was cut off or changed on the way")
        if found is None:
            raise ValueError("is not a join token: `aggregator token create` prints one, which begins with ff1.")
        token = cls(found["id"], _unpadded(found["secret"]), _unpadded(found["pin"]))
        if not SECRET_MIN <= len(token.secret) <= SECRET_MAX or str(token) != text.strip():
            raise ValueError("is not a join token: it was cut off or changed on the way")
        return token

    def __str__(self) -> str:
        return f"ff1.{self.id}.{_text(self.secret)}.{_text(self.pin)}"


def secret_digest(secret: bytes) -> bytes:
    """What a registrar keeps of a token's secret, which is long enough to need no salt."""
    return sha256(b"fieldfare/v1/token\0" + secret).digest()


# -- what crosses the wire -------------------------------------------------------------------------------------------

TokenId = Annotated[str, msgspec.Meta(pattern=rf"^{_ID}$")]
Pem = Annotated[str, msgspec.Meta(min_length=1, max_length=PEM_MAX)]


class EnrolRequest(Wire, frozen=True, kw_only=True):
    """A new device's; `name` is None where the token fixes it. Bytes are base64 in JSON."""

    v: Literal[1]
    token: TokenId
    secret: Annotated[bytes, msgspec.Meta(min_length=SECRET_MIN, max_length=SECRET_MAX)]
    name: Annotated[str, msgspec.Meta(max_length=253)] | None
    csr: Pem

    def __repr__(self) -> str:
        return f"EnrolRequest(token={self.token!r}, name={self.name!r:.80})"


class RenewRequest(Wire, frozen=True, kw_only=True):
    """A known device's: its certificate, which may have expired, and a request for a new key, signed by the old one."""

    v: Literal[1]
    certificate: Pem
    csr: Pem
    signature: Annotated[bytes, msgspec.Meta(min_length=1, max_length=128)]


class BrokerPlace(Wire, frozen=True, kw_only=True):
    """Where the fleet's broker is, as in the `[broker]` section of agent.toml."""

    host: Annotated[str, msgspec.Meta(min_length=1, max_length=253)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65_535)]
    prefix: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,32}(/[A-Za-z0-9_-]{1,32}){0,3}$")]
    message_max: Annotated[int, msgspec.Meta(ge=65_536, le=268_435_455)]


class Enrolment(Wire, frozen=True, kw_only=True):
    """The answer to both requests: an identity, and all that a device needs to use it. Times are seconds since 1970."""

    v: Literal[1]
    certificate: Pem
    ca: Pem
    root: Annotated[bytes, msgspec.Meta(min_length=1, max_length=4 << 10)]
    """root.msgpack as it is pinned."""
    broker: BrokerPlace
    now: Uint
    """The registrar's clock: for devices that have none."""
    renew_at: Uint
    """When the registrar would like to see this device again, at the latest."""


class Refusal(Wire, frozen=True, kw_only=True):
    """Why not: `error` is the typed word, `detail` is for people."""

    v: Literal[1]
    error: Refused
    detail: Annotated[str, msgspec.Meta(max_length=512)]


def encode(message: Wire) -> bytes:
    """A request or an answer as JSON."""
    return msgspec.json.encode(message)


def decode(body: bytes, kind: type[W]) -> W:
    """The message that `body` is; raises EnrolmentError(TOO_LARGE or BAD_REQUEST)."""
    if len(body) > BODY_MAX:
        raise EnrolmentError(Refused.TOO_LARGE, f"{len(body)} bytes, the limit is {BODY_MAX}")
    try:
        return msgspec.json.decode(body, type=kind, strict=True)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        # What was sent is not repeated: it may hold a secret.
        raise EnrolmentError(Refused.BAD_REQUEST, f"not a {kind.__name__}: {error}"[:300]) from None


# -- proofs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Csr:
    """A certificate request whose sender holds the key."""

    public_key: ec.EllipticCurvePublicKey
    name: str | None
    """Its common name, if it has one: a claim, and perhaps no name at all."""
    der: bytes


def make_csr(key: ec.EllipticCurvePrivateKey, name: str | None = None) -> str:
    """A certificate request (PEM) for this key; without a name where the registrar is to say it."""
    attributes = [] if name is None else [x509.NameAttribute(NameOID.COMMON_NAME, name)]
    made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(attributes)).sign(key, hashes.SHA256())
    return made.public_bytes(Encoding.PEM).decode()


def read_csr(pem: str) -> Csr:
    """Check a certificate request: P-256, and signed by its own key; raises EnrolmentError(BAD_CSR)."""
    try:
        found = x509.load_pem_x509_csr(pem.encode())
        key = found.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise EnrolmentError(Refused.BAD_CSR, "its key is not on P-256")
        good = found.is_signature_valid
        names = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        der = found.public_bytes(Encoding.DER)
    except _MALFORMED as error:
        raise EnrolmentError(Refused.BAD_CSR, f"{type(error).__name__}: {error}"[:200]) from None
    if not good:
        raise EnrolmentError(Refused.BAD_CSR, "it is not signed by its own key")
    if len(found.subject) != len(names) or len(names) > 1:
        raise EnrolmentError(Refused.BAD_CSR, "its subject is more than one common name")
    return Csr(key, str(names[0].value) if names else None, der)


def sign_renewal(old: ec.EllipticCurvePrivateKey, csr: str) -> bytes:
    """The old key's word for a certificate request (PEM): ECDSA P-256 over SHA-256, in DER; it verifies as nothing
    else."""
    return old.sign(_RENEW_DOMAIN + x509.load_pem_x509_csr(csr.encode()).public_bytes(Encoding.DER), _ECDSA)


def verify_renewal(public: ec.EllipticCurvePublicKey, csr: Csr, signature: bytes) -> None:
    """Raises EnrolmentError(BAD_SIGNATURE) unless the holder of `public` asked for exactly this request."""
    try:
        public.verify(signature, _RENEW_DOMAIN + csr.der, _ECDSA)
    except InvalidSignature:
        raise EnrolmentError(Refused.BAD_SIGNATURE, "the request is not signed by the certificate's key") from None


def read_certificate(pem: str) -> x509.Certificate:
    """The first certificate of `pem`; raises EnrolmentError(BAD_CERTIFICATE)."""
    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except _MALFORMED as error:
        raise EnrolmentError(Refused.BAD_CERTIFICATE, f"{type(error).__name__}: {error}"[:200]) from None


def pin_of(ca: x509.Certificate) -> bytes:
    """The pin of a token for the fleet of this CA."""
    return sha256(ca.public_bytes(Encoding.DER)).digest()


def pinned_ca(pem: bytes, pin: bytes) -> x509.Certificate:
    """The CA that a registrar sent, if it is the one that the token pins; raises EnrolmentError(WRONG_PIN).

    Until this has returned a device sends nothing that is secret.
    """
    try:
        found = read_certificate(pem[: PEM_MAX + 1].decode("ascii"))
    except (UnicodeDecodeError, EnrolmentError):
        raise EnrolmentError(Refused.WRONG_PIN, "what answers is no registrar: it sent no certificate") from None
    if not hmac.compare_digest(pin_of(found), pin):
        raise EnrolmentError(Refused.WRONG_PIN, "the registrar's CA is not the one that the token was made for")
    return found


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _unpadded(text: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error:
        raise ValueError("is not a join token: it was cut off") from None
