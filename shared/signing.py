"""Signatures over records: Ed25519, a domain for each kind of record, verified on the raw bytes before parsing.

Guarantee: a signature made for one kind of record verifies as no other kind. Who may sign what is shared.trust's job.
"""

import hashlib
from collections.abc import Iterable
from typing import TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from shared import wire
from shared.errors import LocalProtocolError, Reason, RemoteProtocolError
from shared.messages import Receipt, Release, Role, Root, RoundOffer, Signed, TaskManifest

Record = Root | TaskManifest | Release | RoundOffer | Receipt
R = TypeVar("R", Root, TaskManifest, Release, RoundOffer, Receipt)

_KINDS: dict[type[Record], bytes] = {
    Root: b"root",
    TaskManifest: b"manifest",
    Release: b"release",
    RoundOffer: b"offer",
    Receipt: b"receipt",
}


def public_bytes(private: Ed25519PrivateKey) -> bytes:
    """The 32 raw bytes of the public half."""
    return private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def key_id(public: bytes) -> bytes:
    """The 8 bytes that name a key in a signed record."""
    return hashlib.sha256(public).digest()[:8]


def digest(signed: Signed) -> bytes:
    """The 32 bytes that name a record: of its payload, so that two signatures over one record name one record."""
    return hashlib.sha256(signed.payload).digest()


def sign(record: Record, role: Role, private: Ed25519PrivateKey) -> Signed:
    """Sign a record's canonical bytes."""
    payload = wire.pack(record)
    return Signed(
        v=1,
        role=role,
        key=key_id(public_bytes(private)),
        sig=private.sign(_message(type(record), payload)),
        payload=payload,
    )


def verify(signed: Signed, kind: type[R], role: Role, keys: Iterable[bytes]) -> R:
    """The record inside, once its signature holds under one of the raw public `keys`; else RemoteProtocolError."""
    if signed.role is not role:
        raise RemoteProtocolError(Reason.WRONG_ROLE, f"a {kind.__name__} signed as {signed.role}, not as {role}")
    found = next((key for key in keys if key_id(key) == signed.key), None)
    if found is None:
        raise RemoteProtocolError(Reason.UNKNOWN_KEY, f"{role} key {signed.key.hex()} may not sign a {kind.__name__}")
    try:
        Ed25519PublicKey.from_public_bytes(found).verify(signed.sig, _message(kind, signed.payload))
    except InvalidSignature:
        raise RemoteProtocolError(
            Reason.BAD_SIGNATURE, f"{kind.__name__} under {role} key {signed.key.hex()}"
        ) from None
    except ValueError as error:
        raise RemoteProtocolError(Reason.UNKNOWN_KEY, f"{role} key {signed.key.hex()}: {error}") from None
    return wire.unpack(signed.payload, kind)


def _message(kind: type[Record], payload: bytes) -> bytes:
    if kind not in _KINDS:
        raise LocalProtocolError(f"{kind.__name__} is not a signed record")
    return b"fieldfare/v1/" + _KINDS[kind] + b"\0" + payload
