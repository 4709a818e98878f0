"""A small fleet in memory: keys, a task with a linear model, and its signed records. Deterministic, no files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import UNSET, structs

from shared import graph, signing, tensors, wire
from shared.graph import Graph, Kind, Port, Ref, Row, StateSlot
from shared.machine import Instant
from shared.messages import (
    BlobRef,
    ClippedMean,
    Conditions,
    DataContract,
    FedAvg,
    Graphs,
    MeanServer,
    OfferState,
    Plan,
    PrivacyNone,
    PublisherKey,
    Release,
    ReleaseMessage,
    Role,
    Root,
    RootMessage,
    RoundOffer,
    Sgd,
    Signed,
    TaskManifest,
    TensorContract,
    TensorSpec,
    Training,
    Use,
    VerificationKey,
)
from shared.opset import OPSET_VERSION
from shared.trust import Trust

NOW = Instant(mono=1_000.0, utc=1_800_000_000.0)
LAYOUT = [TensorSpec("weight", "parameter", "float32", [2, 3])]
DIMENSION = 6
DATA = DataContract("points", [TensorContract("x", "float32", [3])], TensorContract("y", "int64", [], 2))


def later(seconds: float, start: Instant = NOW) -> Instant:
    """The same clocks, `seconds` on."""
    return Instant(start.mono + seconds, start.utc + seconds)


def key(number: int) -> Ed25519PrivateKey:
    """The same key for the same number."""
    return Ed25519PrivateKey.from_private_bytes(sha256(b"test key %d" % number).digest())


def linear(kind: Kind) -> bytes:
    """y = softmax(weight x): the graph that gives its loss, or its scores and the loss."""
    weight, x, y, scores = range(4)
    rows = (
        Row("aten.linear.default", (Ref(x), Ref(weight))),
        Row("aten.cross_entropy_loss.default", (Ref(scores), Ref(y))),
    )
    outputs = (scores + 1,) if kind == "train" else (scores, scores + 1)
    slots = tuple(StateSlot(spec.name, spec.kind, spec.dtype, spec.shape) for spec in LAYOUT)
    ports = (Port("x", "float32", [3]), Port("y", "int64", []))
    return graph.encode(Graph(kind, OPSET_VERSION, slots, ports, (), rows, outputs))


def weights(value: float = 0.0) -> bytes:
    """The model's safetensors with every weight the same."""
    return tensors.save(LAYOUT, {"weight": np.full((2, 3), value, np.float32)})


@dataclass(frozen=True)
class Records:
    """The fleet's keys and what they sign."""

    root_key: Ed25519PrivateKey = field(default_factory=lambda: key(1))
    publisher: Ed25519PrivateKey = field(default_factory=lambda: key(2))
    aggregator: Ed25519PrivateKey = field(default_factory=lambda: key(3))

    @property
    def root(self) -> Root:
        """The pinned record."""
        keys = [PublisherKey(signing.public_bytes(self.publisher), int(NOW.utc) + 10**6)]
        return Root(1, "test", 1, int(NOW.utc) + 10**6, [signing.public_bytes(self.root_key)], keys)

    @property
    def root_message(self) -> RootMessage:
        """As it is retained."""
        signed = signing.sign(self.root, Role.ROOT, self.root_key)
        return RootMessage(2, signed, signed)

    @property
    def trust(self) -> Trust:
        """What a device or an aggregator of this fleet holds."""
        return Trust(self.root)

    def manifest(self, **changes: object) -> TaskManifest:
        """A manifest of the task `points`; `changes` replace fields, those of the plan included."""
        plan = Plan(goal=3, min_updates=2, rounds=5, deadline=60, over_select=1.0)
        in_plan = {name: value for name, value in changes.items() if name in Plan.__struct_fields__}
        plan = structs.replace(plan, **in_plan)
        manifest = TaskManifest(
            v=1 if plan.until is UNSET and plan.gate is UNSET else 2,
            task="points",
            version=1,
            expires=int(NOW.utc) + 10**5,
            opset=OPSET_VERSION,
            train_graph=sha256(linear("train")).digest(),
            eval_graph=sha256(linear("eval")).digest(),
            layout=LAYOUT,
            training=Training(Sgd(lr=0.1), batch_size=4, epochs=1),
            algorithm=FedAvg(),
            server=MeanServer(),
            data=DATA,
            plan=plan,
            codec="fp32",
            rule=ClippedMean(),
            privacy=PrivacyNone(10.0),
            conditions=Conditions(),
            aggregator_keys=[
                VerificationKey(signing.public_bytes(self.aggregator), [Use.OFFER, Use.RELEASE, Use.RECEIPT])
            ],
        )
        return structs.replace(manifest, **{name: each for name, each in changes.items() if name not in in_plan})

    def sign_manifest(self, manifest: TaskManifest) -> Signed:
        """As the publisher signs it."""
        return signing.sign(manifest, Role.PUBLISHER, self.publisher)

    def release(self, manifest: Signed, number: int = 0, blob: bytes | None = None, **changes: object) -> Signed:
        """A release of a signed manifest: by the publisher if it is number 0, else by the aggregator."""
        data = weights() if blob is None else blob
        release = Release(
            v=1,
            task="points",
            manifest=signing.digest(manifest),
            number=number,
            parent=None,
            weights=BlobRef(sha256(data).digest(), len(data)),
            control_variate=None,
            delta=None,
            metrics={},
            privacy_spent=None,
            restores=None,
        )
        release = structs.replace(release, **changes)
        role, private = (Role.PUBLISHER, self.publisher) if number == 0 else (Role.AGGREGATOR, self.aggregator)
        return signing.sign(release, role, private)

    def message(self, manifest: TaskManifest | None = None, number: int = 0, value: float = 0.0) -> ReleaseMessage:
        """A whole release, ready to travel."""
        signed = self.sign_manifest(self.manifest() if manifest is None else manifest)
        blob = weights(value)
        graphs = Graphs(linear("train"), linear("eval"))
        return ReleaseMessage(1, signed, self.release(signed, number, blob), graphs, blob)

    def offer(self, message: ReleaseMessage, number: int = 1, **changes: object) -> RoundOffer:
        """An open offer, to everyone, on a release."""
        offer = RoundOffer(
            v=1,
            task="points",
            manifest=signing.digest(message.manifest),
            release=signing.digest(message.release),
            round=number,
            sequence=0,
            state=OfferState.OPEN,
            participation=2**32,
            clip=10.0,
            shards=1,
            suite="x25519",
            hpke_key=bytes(range(32)),
            deadline=int(NOW.utc) + 60,
        )
        return structs.replace(offer, **changes)

    def sign_offer(self, offer: RoundOffer) -> Signed:
        """As the aggregator signs it."""
        return signing.sign(offer, Role.AGGREGATOR, self.aggregator)


def counted() -> Callable[[int], bytes]:
    """Random bytes that are the same in every run."""
    state = [0]

    def draw(size: int) -> bytes:
        state[0] += 1
        return sha256(b"draw %d" % state[0]).digest()[:size]

    return draw


def repacked(message: object, **fields: object) -> bytes:
    """A message's bytes with some fields set to what its type would not allow."""
    plain = wire_builtins(message)
    return wire.pack({**plain, **fields})


def wire_builtins(message: object) -> Mapping[str, object]:
    """A message as the plain map that travels."""
    import msgspec

    plain: Mapping[str, object] = msgspec.to_builtins(message, builtin_types=(bytes,))
    return plain
