"""The registrar's rules: which token lets whom in, whose certificate is renewed, and what is issued again. Pure.

A token's life:

    open --enrol--> used        with `again`, the same key gets the same certificate: its answer may have been lost
    open --expires--> expired
    open --revoke--> revoked

A name belongs to the device that took it first: a second one needs a token made for exactly this name, by an operator
who said that it replaces the first. Nothing here issues, stores or reads a clock; `now` is seconds since 1970. A call
that raises has changed nothing, because none changes anything: decisions come back for the shell to carry out.
"""

import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal, Protocol

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from shared.enrolment import Csr, EnrolRequest, read_csr, secret_digest, verify_renewal
from shared.errors import EnrolmentError, Refused
from shared.topics import is_name

ISSUES_MAX = 16
"""Certificates of one device within one lifetime: a stolen key must not fill the disk."""
LABELS_MAX = 16

_PATTERN = re.compile(r"[a-z0-9*][a-z0-9*-]{0,62}")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
_NOBODY = bytes(32)
_HORIZON = 0.75
"""Of a certificate's life, within which the same request gets it again: renewal is wanted at two thirds."""

TokenState = Literal["open", "used", "expired", "revoked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredToken:
    """What is kept of a token; its secret is not. `name` is a device's, a pattern with *, or None for any."""

    id: str
    digest: bytes
    name: str | None
    again: bool
    """Whether its device may take the place of one of the same name."""
    labels: Mapping[str, str]
    created: int
    expires: int
    revoked_at: int | None = None
    used_at: int | None = None
    device: str | None = None
    key: bytes | None = None
    """The `key_id` that used it."""

    def state(self, now: float) -> TokenState:
        """Where it stands; what happened goes before what time did."""
        if self.revoked_at is not None:
            return "revoked"
        if self.used_at is not None:
            return "used"
        return "expired" if now >= self.expires else "open"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredDevice:
    """A device that has or had a certificate."""

    name: str
    labels: Mapping[str, str]
    enrolled: int
    how: Literal["token", "bundle"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCertificate:
    """One that was issued."""

    serial: int
    device: str
    key: bytes
    """`key_id` of its public key."""
    issued: int
    not_after: int
    pem: str
    revoked_at: int | None = None


class Ledger(Protocol):
    """What the rules ask of the registry."""

    def token(self, token: str) -> StoredToken | None:
        """The token of this id."""

    def device(self, name: str) -> StoredDevice | None:
        """The device of this name."""

    def certificate(self, serial: int) -> StoredCertificate | None:
        """The certificate of this serial number, if it is known."""

    def of_key(self, key: bytes) -> StoredCertificate | None:
        """The newest certificate for this key."""

    def issued_since(self, device: str, moment: int) -> int:
        """How many certificates a device got since then."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds: how long a certificate lives, and how long after its end it can still be renewed."""

    lifetime: int
    renewable: int


@dataclass(frozen=True, slots=True)
class Shown:
    """A certificate that our CA issued for a device, as the shell verified it but for its date."""

    name: str
    public_key: ec.EllipticCurvePublicKey
    serial: int
    not_after: float


@dataclass(frozen=True, slots=True)
class Issue:
    """Issue a certificate for `name` and `key`; `token` is used up by it, None in a renewal."""

    name: str
    key: ec.EllipticCurvePublicKey
    token: StoredToken | None


@dataclass(frozen=True, slots=True)
class Repeat:
    """Answer with this certificate again."""

    certificate: StoredCertificate


def enrol(ledger: Ledger, times: Times, request: EnrolRequest, denied: frozenset[str], now: float) -> Issue | Repeat:
    """What to do for a new device; raises EnrolmentError."""
    token = ledger.token(request.token)
    # As long for an unknown token as for a wrong secret, and the same answer.
    right = hmac.compare_digest(_NOBODY if token is None else token.digest, secret_digest(request.secret))
    if token is None or not right:
        raise EnrolmentError(Refused.BAD_TOKEN, "there is no such token")
    csr = read_csr(request.csr)
    state = token.state(now)
    if state == "revoked":
        raise EnrolmentError(Refused.TOKEN_REVOKED, "the operator took this token back")
    if state == "used":
        return _used(ledger, token, csr, request.name, denied, now)
    if state == "expired":
        raise EnrolmentError(Refused.TOKEN_EXPIRED, "ask the operator for a new token")
    name = _name(token, request.name, csr.name)
    if name in denied:
        raise EnrolmentError(Refused.DENIED, f"{name} is on the deny list")
    if ledger.device(name) is not None and not (token.again and token.name == name):
        raise EnrolmentError(
            Refused.NAME_TAKEN, f"there is a device {name}; take another name, or a token made to replace it"
        )
    if ledger.of_key(key_id(csr.public_key)) is not None:
        raise EnrolmentError(Refused.BAD_CSR, "this key has a certificate already; make a new one")
    _rate(ledger, times, name, now)
    return Issue(name, csr.public_key, token)


def renew(
    ledger: Ledger,
    times: Times,
    shown: Shown,
    csr: Csr,
    signature: bytes,
    denied: frozenset[str],
    now: float,
) -> Issue | Repeat:
    """What to do for a device that shows a certificate of ours; raises EnrolmentError."""
    verify_renewal(shown.public_key, csr, signature)  # first: who holds no key learns nothing
    if csr.name is not None and csr.name != shown.name:
        raise _other(csr.name, shown.name)
    if shown.name in denied:
        raise EnrolmentError(Refused.DENIED, f"{shown.name} is on the deny list")
    known = ledger.certificate(shown.serial)
    if known is not None and known.revoked_at is not None:
        raise EnrolmentError(Refused.REVOKED, "this certificate was revoked; enrol with a new token")
    if now > shown.not_after + times.renewable:
        raise EnrolmentError(Refused.TOO_LATE, "this certificate expired too long ago; enrol with a new token")
    found = ledger.of_key(key_id(csr.public_key))
    if found is not None:
        if found.device != shown.name or found.revoked_at is not None:
            raise EnrolmentError(Refused.BAD_CSR, "this key has a certificate already; make a new one")
        if now < found.issued + _HORIZON * (found.not_after - found.issued):
            return Repeat(found)
    _rate(ledger, times, shown.name, now)
    return Issue(shown.name, csr.public_key, None)


def end_of(times: Times, ca_end: float, now: float) -> float:
    """When a certificate that is issued now ends; nothing outlives the CA."""
    return min(now + times.lifetime, ca_end)


def renew_at(issued: float, not_after: float) -> int:
    """When its device should come again: two thirds of its life."""
    return int(issued + (not_after - issued) * 2 / 3)


def key_id(public: ec.EllipticCurvePublicKey) -> bytes:
    """A public key's name in the registry: sha256 of its SubjectPublicKeyInfo."""
    return sha256(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def is_pattern(text: str) -> bool:
    """Whether a token may be limited to this: a device's name, or one with * in it for any characters."""
    return _PATTERN.fullmatch(text) is not None


def matches(pattern: str, name: str) -> bool:
    """Whether a token that is limited to `pattern` may name a device so."""
    # Linear, whatever the pattern: the pieces between the stars are looked for from left to right.
    first, *rest = pattern.split("*")
    if not rest:
        return name == pattern
    *middle, last = rest
    if not name.startswith(first):
        return False
    at = len(first)
    for piece in middle:
        at = name.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return len(name) - at >= len(last) and name.endswith(last)


def labels_of(texts: Sequence[str]) -> dict[str, str]:
    """The labels that `key=value` texts say; ValueError says which is none."""
    found = dict(text.partition("=")[::2] for text in texts)
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not _LABEL.fullmatch(key) or (value and not _LABEL.fullmatch(value)):
            raise ValueError(f"{text!r:.80} is not key=value of a-z A-Z 0-9 . _ / -")
    if len(found) > LABELS_MAX:
        raise ValueError(f"more than {LABELS_MAX} labels")
    return found


def _used(
    ledger: Ledger, token: StoredToken, csr: Csr, wanted: str | None, denied: frozenset[str], now: float
) -> Repeat:
    """The same key may ask again, as long as what it got is worth anything; anybody else is too late."""
    key = key_id(csr.public_key)
    found = ledger.of_key(key)
    if token.key != key or found is None or token.device is None or now >= found.not_after:
        raise EnrolmentError(Refused.TOKEN_USED, "another device, or an earlier try with another key, used this token")
    for name in (wanted, csr.name):
        if name is not None and name != token.device:
            raise _other(name, token.device)
    if token.device in denied:
        raise EnrolmentError(Refused.DENIED, f"{token.device} is on the deny list")
    if found.revoked_at is not None:
        raise EnrolmentError(Refused.REVOKED, "this certificate was revoked; enrol with a new token")
    return Repeat(found)


def _name(token: StoredToken, wanted: str | None, claimed: str | None) -> str:
    """The name that the token gives, or lets its device choose."""
    fixed = token.name if token.name is not None and "*" not in token.name else None
    name = next((each for each in (wanted, claimed, fixed) if each is not None), None)
    if name is None:
        raise EnrolmentError(Refused.NAME_NEEDED, "this token leaves the name to the device: give one")
    if not is_name(name):
        raise _bad(name)
    if claimed is not None and claimed != name:
        raise _other(claimed, name)
    if token.name is not None and not matches(token.name, name):
        raise _other(name, token.name)
    return name


def _rate(ledger: Ledger, times: Times, name: str, now: float) -> None:
    if ledger.issued_since(name, int(now) - times.lifetime) >= ISSUES_MAX:
        raise EnrolmentError(Refused.TOO_MANY, f"{ISSUES_MAX} certificates for {name} within one lifetime")


def _other(name: str, right: str) -> EnrolmentError:
    if not is_name(name):
        return _bad(name)
    return EnrolmentError(Refused.WRONG_NAME, f"{name} where it may only be {right}")


def _bad(name: str) -> EnrolmentError:
    return EnrolmentError(Refused.BAD_NAME, f"{name!r:.80} is not 1-63 of a-z 0-9 - beginning with a letter or digit")
