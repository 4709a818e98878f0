"""The messages behind the frozen byte vectors of protocol version 1; run it to write vectors that do not exist yet.

    python -m tests.vectors.make

It never overwrites one: a vector that has changed means that a fleet in the field cannot read us any more.
"""

from collections.abc import Callable
from pathlib import Path

from shared import wire
from shared.messages import (
    AggregatorStatus,
    DeviceStatus,
    Outcome,
    PlainBody,
    Receipt,
    Release,
    Role,
    RoundOffer,
    Signed,
    TaskManifest,
    UpdateContext,
    UpdateHead,
    UpdateMessage,
    Wire,
)
from tests.records import Records

_RECORDS = Records()
_SIGNED = Signed(v=1, role=Role.PUBLISHER, key=b"K" * 8, sig=b"S" * 64, payload=b"payload")


def _context() -> UpdateContext:
    return UpdateContext(
        v=1,
        task="points",
        manifest=b"M" * 32,
        release=b"R" * 32,
        round=7,
        device="sensor-1",
        report=b"r" * 16,
        mode="plain",
        k_min=0,
        codec="fp32",
        dimension=6,
    )


def _head() -> UpdateHead:
    return UpdateHead(
        v=1,
        context=wire.pack(_context()),
        encapsulation=b"E" * 80,
        size=1234,
        sha256=b"H" * 32,
        chunk_size=0,
        certificate=b"C" * 100,
        shares=[],
    )


def _release() -> Release:
    return wire.unpack(_RECORDS.message(number=3).release.payload, Release)


def _manifest() -> TaskManifest:
    return _RECORDS.manifest()


def _offer() -> RoundOffer:
    return _RECORDS.offer(_RECORDS.message())


def _status() -> DeviceStatus:
    return DeviceStatus(
        v=1,
        session=b"12345678",
        online=True,
        version="0.1.0",
        opsets=[1],
        eligible=False,
        obstacles=["mains"],
        datasets=["points"],
        sent=1_800_000_000,
    )


VECTORS: dict[str, Callable[[], Wire]] = {
    "signed": lambda: _SIGNED,
    "root": lambda: _RECORDS.root,
    "manifest": _manifest,
    "release": _release,
    "offer": _offer,
    "release-message": lambda: _RECORDS.message(),
    "context": _context,
    "head": _head,
    "update": lambda: UpdateMessage(v=1, head=wire.pack(_head()), sig=b"s" * 70, body=b"ciphertext"),
    "body": lambda: PlainBody(examples=40, steps=10, metrics={"accuracy": 0.5, "loss": 1.25}, holdout=10),
    "receipt": lambda: Receipt(1, b"H" * 32, "points", 7, "sensor-1", Outcome.REJECTED, "norm"),
    "device-status": _status,
    "aggregator-status": lambda: AggregatorStatus(v=1, session=b"12345678", online=True, version="0.1.0"),
}

if __name__ == "__main__":
    for name, make in VECTORS.items():
        path = Path(__file__).parent / f"v1-{name}.hex"
        if not path.exists():
            text = wire.pack(make()).hex()
            path.write_text("\n".join(text[at : at + 100] for at in range(0, len(text), 100)) + "\n")
