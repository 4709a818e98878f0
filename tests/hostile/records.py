"""Releases, offers, receipts and updates as publisher, aggregator and device make them, each piece replaceable.

Every honest step is the product's own code; what a test replaces is exactly what it shows refused. No torch: the model
is a graph written by hand, and a delta is a numpy vector.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import msgpack
import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from msgspec import structs

from shared import chunks, graph, identity, sealing, signing, tensors, wire
from shared.graph import Constant, Graph, Kind, Port, Ref, Row, StateSlot
from shared.messages import (
    PARTICIPATION_ALL,
    BlobRef,
    ClippedMean,
    Conditions,
    DataContract,
    FedAvg,
    Graphs,
    MeanServer,
    OfferState,
    Outcome,
    PlainBody,
    Plan,
    PrivacyNone,
    PublisherKey,
    Receipt,
    Release,
    ReleaseMessage,
    Role,
    Root,
    RoundOffer,
    Sgd,
    Signed,
    TaskManifest,
    TensorContract,
    TensorSpec,
    Training,
    UpdateContext,
    UpdateHead,
    UpdateMessage,
    Use,
    VerificationKey,
)
from shared.opset import OPSET_VERSION
from tests.broker.broker import Fleet

LAYOUT = [TensorSpec("weight", "parameter", "float32", [3, 4])]
DIMENSION = 12
CLIP = 10.0
INPUT, TARGET = TensorContract("x", "float32", [4]), TensorContract("y", "int64", [], 3)
WEIGHT, X, Y = range(3)
"""Numbers of the values in every graph here; constants come next, then the rows."""

USES = [Use.OFFER, Use.RELEASE, Use.RECEIPT]
DAY = 86_400


# -- the model ---------------------------------------------------------------------------------------------------


def rows(first: int) -> tuple[Row, Row]:
    """A linear layer and its loss; `first` is the number of the first row's value."""
    return (
        Row("aten.linear.default", (Ref(X), Ref(WEIGHT))),
        Row("aten.cross_entropy_loss.default", (Ref(first), Ref(Y))),
    )


def layout_of(width: int) -> list[TensorSpec]:
    """Of the linear layer with so many inputs: 3 x width values."""
    return [TensorSpec("weight", "parameter", "float32", [3, width])]


def graph_bytes(kind: Kind, extra: Sequence[Row] = (), constants: tuple[Constant, ...] = (), width: int = 4) -> bytes:
    """The linear layer of `width` inputs with `extra` rows behind it, which nothing uses, and constants."""
    first = 3 + len(constants)
    outputs = (first + 1,) if kind == "train" else (first, first + 1)
    return graph.encode(
        Graph(
            kind,
            OPSET_VERSION,
            tuple(StateSlot(spec.name, spec.kind, spec.dtype, spec.shape) for spec in layout_of(width)),
            (Port("x", "float32", [width]), Port("y", "int64", [])),
            constants,
            (*rows(first), *extra),
            outputs,
        )
    )


def weights(value: float = 0.0, layout: Sequence[TensorSpec] = LAYOUT) -> bytes:
    """Weights that are all `value`; NaN too, which the product's own writer refuses to write."""
    spec = layout[0]
    found = tensors.save(layout, {spec.name: np.zeros(spec.shape, np.float32)})
    count = int(np.prod(spec.shape))
    return found[: -4 * count] + np.full(count, value, "<f4").tobytes()


@dataclass(frozen=True)
class Model:
    """What a release carries."""

    train: bytes = field(default_factory=lambda: graph_bytes("train"))
    eval: bytes = field(default_factory=lambda: graph_bytes("eval"))
    weights: bytes = field(default_factory=weights)


MODEL = Model()


def wide(width: int) -> Model:
    """A model whose update needs many chunks; `of_width` says what its manifest says otherwise."""
    return Model(graph_bytes("train", width=width), graph_bytes("eval", width=width), weights(layout=layout_of(width)))


def of_width(width: int) -> dict[str, Any]:
    """What a manifest of a wide model says otherwise."""
    data = DataContract(dataset="d", inputs=[TensorContract("x", "float32", [width])], target=TARGET)
    return {"layout": layout_of(width), "data": data}


PLAN = Plan(goal=1000, min_updates=1, rounds=1000, deadline=3600)


# -- who signs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Keys:
    """The fleet's signing keys, all in the hand of the test."""

    publisher: Ed25519PrivateKey
    aggregator: Ed25519PrivateKey
    root: Ed25519PrivateKey
    stranger: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    """Of nobody."""
    clerk: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    """A second aggregator's, which every manifest allows receipts and nothing else."""
    retired: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    """A publisher's whose time is over; see `retire`."""


def load_keys(fleet: Fleet) -> Keys:
    """The keys that `fleet init` made."""
    return Keys(
        identity.load_signing_key(fleet.folder / "publisher" / "publisher.key"),
        identity.load_signing_key(fleet.folder / "aggregator" / "signing.key"),
        identity.load_signing_key(fleet.folder / "root" / "root.key"),
    )


def retire(fleet: Fleet, keys: Keys) -> None:
    """Let the fleet's root record name the retired key too, before anybody pins it."""
    pinned = fleet.folder / "root" / "root.msgpack"
    root = wire.unpack(wire.unpack(pinned.read_bytes(), Signed).payload, Root)
    old = PublisherKey(signing.public_bytes(keys.retired), int(time.time()) - 1)
    changed = signing.sign(structs.replace(root, publishers=[*root.publishers, old]), Role.ROOT, keys.root)
    for path in (pinned, fleet.folder / "aggregator" / "root.msgpack"):
        path.write_bytes(wire.pack(changed))


def sign_bytes(payload: bytes, kind: type[signing.Record], role: Role, private: Ed25519PrivateKey) -> Signed:
    """A good signature over any bytes, as if they were a record of this kind."""
    sig = private.sign(signing._message(kind, payload))
    return Signed(v=1, role=role, key=signing.key_id(signing.public_bytes(private)), sig=sig, payload=payload)


def manifest(keys: Keys, task: str, version: int = 1, model: Model = MODEL, **changes: Any) -> TaskManifest:
    """A publisher's manifest for `model`."""
    plain = TaskManifest(
        v=1,
        task=task,
        version=version,
        expires=int(time.time()) + DAY,
        opset=OPSET_VERSION,
        train_graph=sha256(model.train).digest(),
        eval_graph=sha256(model.eval).digest(),
        layout=LAYOUT,
        training=Training(optimizer=Sgd(lr=0.1), batch_size=16, epochs=1),
        algorithm=FedAvg(),
        server=MeanServer(),
        data=DataContract(dataset="d", inputs=[INPUT], target=TARGET),
        plan=PLAN,
        codec="fp32",
        rule=ClippedMean(),
        privacy=PrivacyNone(clip_max=CLIP),
        conditions=Conditions(),
        aggregator_keys=[
            VerificationKey(key=signing.public_bytes(keys.aggregator), uses=USES),
            VerificationKey(key=signing.public_bytes(keys.clerk), uses=[Use.RECEIPT]),
        ],
        metric="accuracy",
    )
    return structs.replace(plain, **changes)


def signed_release(
    signed_manifest: Signed,
    of: str,
    number: int = 0,
    by: Ed25519PrivateKey | None = None,
    role: Role = Role.PUBLISHER,
    model: Model = MODEL,
    **changes: Any,
) -> Signed:
    """A release of a signed manifest of the task `of`."""
    assert by is not None
    plain = Release(
        v=1,
        task=of,
        manifest=signing.digest(signed_manifest),
        number=number,
        parent=None,
        weights=BlobRef(sha256=sha256(model.weights).digest(), size=len(model.weights)),
        control_variate=None,
        delta=None,
        metrics={},
        privacy_spent=None,
        restores=None,
    )
    return signing.sign(structs.replace(plain, **changes), role, by)


def release(keys: Keys, described: TaskManifest, model: Model = MODEL, **changes: Any) -> ReleaseMessage:
    """The whole message for a manifest; `changes` replace its parts."""
    signed = signing.sign(described, Role.PUBLISHER, keys.publisher)
    plain = ReleaseMessage(
        v=1,
        manifest=signed,
        release=signed_release(signed, described.task, by=keys.publisher, model=model),
        graphs=Graphs(train=model.train, eval=model.eval),
        weights=model.weights,
    )
    return structs.replace(plain, **changes)


def offer(described: TaskManifest, message: ReleaseMessage, number: int = 1, **changes: Any) -> RoundOffer:
    """An open offer that selects everybody."""
    plain = RoundOffer(
        v=1,
        task=described.task,
        manifest=signing.digest(message.manifest),
        release=signing.digest(message.release),
        round=number,
        sequence=0,
        state=OfferState.OPEN,
        participation=PARTICIPATION_ALL,
        clip=CLIP,
        shards=1,
        suite="x25519",
        hpke_key=sealing.generate()[1],
        deadline=int(time.time()) + 3600,
    )
    return structs.replace(plain, **changes)


def receipt(task: str, device: str, **changes: Any) -> Receipt:
    """A receipt for a head that nobody sent."""
    plain = Receipt(v=1, head=bytes(32), task=task, round=1, device=device, outcome=Outcome.ACCEPTED)
    return structs.replace(plain, **changes)


# -- updates -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A light device: a name, a certificate and a key."""

    name: str
    certificate: bytes
    key: ec.EllipticCurvePrivateKey


def load_device(fleet: Fleet, name: str) -> Device:
    """A device of the fleet, with the bundle that `device add` makes."""
    found = fleet.device(name)
    certificate = identity.load_certificate(found.certificate).public_bytes(Encoding.DER)
    return Device(name, certificate, identity.load_key(found.key))


@dataclass(frozen=True)
class Update:
    """An update ready to be sent."""

    head: bytes
    signature: bytes
    body: bytes | None
    chunk: int = 0
    """Bytes of a chunk, if its body is sent in chunks and not with the head."""

    @property
    def pieces(self) -> list[bytes]:
        """The chunks."""
        return [bytes(piece) for piece in chunks.pieces(self.body or b"", self.chunk)]

    @property
    def name(self) -> str:
        """What its topic calls it."""
        return sha256(self.head).hexdigest()[:32]

    @property
    def payload(self) -> bytes:
        """The message."""
        body = None if self.chunk else self.body
        return wire.pack(UpdateMessage(v=2 if body is None else 1, head=self.head, sig=self.signature, body=body))


def values(count: int = DIMENSION, value: float = 0.01) -> bytes:
    """An encoded delta."""
    return np.full(count, value, "<f4").tobytes()


def body(**changes: Any) -> PlainBody:
    """What a device reports beside its delta."""
    plain = PlainBody(examples=10, steps=1, metrics={"loss": 1.0, "accuracy": 0.5}, holdout=4)
    return structs.replace(plain, **changes)


def update(
    device: Device,
    offered: RoundOffer,
    *,
    delta: bytes | None = None,
    report: object = None,
    context: Mapping[str, object] | None = None,
    head: Mapping[str, object] | None = None,
    hpke_key: bytes | None = None,
    spoil: tuple[str, int] | None = None,
    context_bytes: bytes | None = None,
    chunk: int = 0,
) -> Update:
    """An update of `device` for an offer: correct, unless told otherwise.

    `spoil` flips a bit of the "body" or the "encapsulation" at this index and then signs what came of it.
    `chunk` are the bytes of a chunk, if its body is sent in chunks.
    `context_bytes` go in place of the packed context, sealed and signed like it.
    """
    plain = UpdateContext(
        v=1,
        task=offered.task,
        manifest=offered.manifest,
        release=offered.release,
        round=offered.round,
        device=device.name,
        report=sha256(repr((context, head, delta)).encode()).digest()[:16],
        mode="plain",
        k_min=0,
        codec="fp32",
        dimension=DIMENSION,
    )
    packed = wire.pack(structs.replace(plain, **(context or {}))) if context_bytes is None else context_bytes
    said = body() if report is None else report
    assert isinstance(said, PlainBody)
    encapsulation, sealed = sealing.seal(
        said, values() if delta is None else delta, hpke_key or offered.hpke_key, packed
    )
    ciphertext = bytes(sealed)
    if spoil is not None and spoil[0] == "body":
        ciphertext = flip(ciphertext, spoil[1])
    elif spoil is not None:
        encapsulation = flip(encapsulation, spoil[1])
    whole = UpdateHead(
        v=2 if chunk else 1,
        context=packed,
        encapsulation=encapsulation,
        size=len(ciphertext),
        sha256=sha256(ciphertext).digest(),
        chunk_size=chunk,
        certificate=device.certificate,
        shares=[],
    )
    signed = wire.pack(structs.replace(whole, **(head or {})))
    return Update(signed, identity.sign_head(device.key, signed), ciphertext, chunk)


# -- malformed bytes ---------------------------------------------------------------------------------------------


def flip(data: bytes, at: int, bit: int = 0x10) -> bytes:
    """`data` with one bit changed in the byte at this index."""
    changed = bytearray(data)
    changed[at] ^= bit
    return bytes(changed)


def builtins(data: bytes) -> dict[str, Any]:
    """A packed message as plain values."""
    found: dict[str, Any] = msgpack.unpackb(data)
    return found


def packed(plain: object) -> bytes:
    """Plain values as a message, however wrong."""
    data: bytes = msgpack.packb(plain)
    return data


def edited(data: bytes, **fields: object) -> bytes:
    """A packed message with some of its fields replaced or added, however wrong."""
    return packed({**builtins(data), **fields})


def without(data: bytes, name: str) -> bytes:
    """A packed message that lacks a field."""
    return packed({key: value for key, value in builtins(data).items() if key != name})


def random_bytes(size: int = 1 << 20) -> bytes:
    """The same random megabyte each time."""
    return np.random.default_rng(7).bytes(size)


_MAPS = b"\xdd\x00\x01\x86\xa0" + b"\x80" * 100_000
"""An array of 100,000 empty maps: 100 KB that become 7 MB."""

JUNK: Mapping[str, tuple[bytes, str]] = {
    "text": (b"Dear fleet,\nplease train this.\n", "not_msgpack"),
    "random": (random_bytes(), "not_msgpack"),
    "empty": (b"", "empty"),
    "nothing": (b"\xc0", "wrong_type"),
    "list": (b"\x91\xc0", "wrong_type"),
    "deep": (b"\x91" * 100_000 + b"\xc0", "not_msgpack"),
    "maps": (b"\x9a" + _MAPS * 10, "too_large"),
    "repeated_key": (b"\x82\xa1v\x01\xa1v\x01", "not_canonical"),
    "map_as_key": (b"\x81\x80\x01", "not_msgpack"),
    "extension": (b"\x81\xa1v\xc7\x08\x05" + bytes(8), "not_msgpack"),
    "timestamp": (b"\x81\xa1v\xd6\xff" + bytes(4), "not_msgpack"),
    "lying_bytes": (b"\x81\xa1v\xc6\xff\xff\xff\xff", "not_msgpack"),
    "lying_list": (b"\x81\xa1v\xdd\xff\xff\xff\xff", "not_msgpack"),
    "lying_map": (b"\xdf\xff\xff\xff\xff", "not_msgpack"),
    "no_text": (b"\x81\xa1\xff\x01", "not_msgpack"),
    "next_version": (b"\x81\xa1v\x03", "version"),
    "no_fields": (b"\x81\xa1v\x01", "wrong_type"),
}
"""Bytes that are no message of any kind, and the reason with which each parser refuses them."""
