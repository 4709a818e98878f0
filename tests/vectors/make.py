"""The messages behind the frozen byte vectors of each protocol version; run it to write those that do not exist yet.

    python -m tests.vectors.make

It never overwrites one: a vector that has changed means that a fleet in the field cannot read us any more.
"""

from collections.abc import Callable
from pathlib import Path

from msgspec import structs

from shared import wire
from shared.messages import (
    AggregatorStatus,
    BlobRef,
    Conditions,
    DeviceStatus,
    Gate,
    Graphs,
    Missing,
    Outcome,
    PlainBody,
    Receipt,
    Release,
    ReleaseMessage,
    Role,
    RootMessage,
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


def _chunked_release() -> Release:
    blob = BlobRef(sha256=b"W" * 32, size=300_000, chunk_size=122_880, chunks=[b"0" * 32, b"1" * 32, b"2" * 32])
    return structs.replace(_release(), v=2, weights=blob, restores=b"P" * 32)


VECTORS: dict[str, Callable[[], Wire]] = {
    "v1-signed": lambda: _SIGNED,
    "v1-root": lambda: _RECORDS.root,
    "v1-manifest": _manifest,
    "v1-release": _release,
    "v1-offer": _offer,
    "v1-release-message": lambda: _RECORDS.message(),
    "v1-context": _context,
    "v1-head": _head,
    "v1-update": lambda: UpdateMessage(v=1, head=wire.pack(_head()), sig=b"s" * 70, body=b"ciphertext"),
    "v1-body": lambda: PlainBody(examples=40, steps=10, metrics={"accuracy": 0.5, "loss": 1.25}, holdout=10),
    "v1-receipt": lambda: Receipt(1, b"H" * 32, "points", 7, "sensor-1", Outcome.REJECTED, "norm"),
    "v1-device-status": _status,
    "v1-aggregator-status": lambda: AggregatorStatus(v=1, session=b"12345678", online=True, version="0.1.0"),
    "v2-root-message": lambda: RootMessage(2, structs.replace(_SIGNED, role=Role.ROOT), _SIGNED),
    "v2-manifest": lambda: _RECORDS.manifest(until=0.95, gate=Gate(drop=0.1, ratio=1.5, reporters=4)),
    "v2-manifest-conditions": lambda: _RECORDS.manifest(
        v=2, conditions=Conditions(mains=True, idle_user=True, unmetered=True)
    ),
    "v2-release": _chunked_release,
    "v2-release-message": lambda: ReleaseMessage(
        2, _SIGNED, structs.replace(_SIGNED, role=Role.AGGREGATOR), Graphs(b"train", b"eval")
    ),
    "v2-head": lambda: structs.replace(_head(), v=2, size=300_000, chunk_size=122_880),
    "v2-update": lambda: UpdateMessage(v=2, head=b"head", sig=b"s" * 70),
    "v2-missing": lambda: Missing(v=2, head=b"H" * 32, chunks=[0, 1, 65]),
    "v2-device-status": lambda: structs.replace(_status(), v=2),
}

if __name__ == "__main__":
    for name, make in VECTORS.items():
        path = Path(__file__).parent / f"{name}.hex"
        if not path.exists():
            text = wire.pack(make()).hex()
            path.write_text("\n".join(text[at : at + 100] for at in range(0, len(text), 100)) + "\n")
