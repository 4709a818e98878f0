"""The messages that cross the wire, as frozen structs; every field name is a wire string and never renamed.

Limits that are properties of a message live here as annotations; what depends on other state is checked where that
state is. Integers are unsigned and below 2^63 unless said otherwise. Times are whole seconds of UTC.

Versions: this program speaks protocol 2 and 1. A writer uses the lowest version that can say what it has to say, so an
older peer understands all that does not need the newer one. `v` allows the versions in which a message exists; a field
that came later is UNSET, and so absent, in a message of an earlier version.
"""

import itertools
from enum import StrEnum
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"
"""Devices and tasks. Services begin with an underscore, which this pattern cannot match."""

PROTOCOL = 2
"""The newest protocol version of this program; it reads this one and the one before."""
First = Literal[1]
"""Of messages that are as they were in the first version."""
Version = Literal[1, 2]
"""Of messages that have grown."""
Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
Uint = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
ReportId = Annotated[bytes, Meta(min_length=16, max_length=16)]
SessionId = Annotated[bytes, Meta(min_length=8, max_length=16)]
Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
Label = Annotated[str, Meta(min_length=1, max_length=128)]
Text = Annotated[str, Meta(max_length=512)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Above = Annotated[float, Meta(gt=0.0, le=1e12)]
NotBelow = Annotated[float, Meta(ge=0.0, le=1e12)]
Shape = Annotated[list[Annotated[int, Meta(ge=0, le=2**31)]], Meta(max_length=8)]
Metric = Literal["accuracy", "binary_accuracy", "rmse", "loss"]
"""What a task's hold-outs may be judged by."""
RISING: frozenset[Metric] = frozenset({"accuracy", "binary_accuracy"})
"""The metrics that are better when higher, and shares of one; the others are errors."""
Metrics = Annotated[dict[Label, float], Meta(max_length=64)]

PARTICIPATION_ALL = 2**32
"""The participation that selects every device."""
MISSING_MAX = 64
"""Chunks of one update that are asked for at once."""


class Wire(Struct, frozen=True, forbid_unknown_fields=True):
    """What crosses the wire: immutable, and an unknown field is an error."""


# -- signed records ----------------------------------------------------------------------------------------------


class Role(StrEnum):
    """Who may sign what; see shared.signing."""

    ROOT = "root"
    PUBLISHER = "publisher"
    AGGREGATOR = "aggregator"


class Use(StrEnum):
    """What an aggregator key may sign."""

    OFFER = "offer"
    RELEASE = "release"
    RECEIPT = "receipt"


class Signed(Wire, frozen=True):
    """A record's bytes with one Ed25519 signature; verified before `payload` is parsed."""

    v: First
    role: Role
    key: Annotated[bytes, Meta(min_length=8, max_length=8)]
    sig: Annotated[bytes, Meta(min_length=64, max_length=64)]
    payload: Annotated[bytes, Meta(min_length=1, max_length=4 << 20)]


class PublisherKey(Wire, frozen=True):
    """A key that may sign manifests and releases numbered 0, until `expires`."""

    key: Key
    expires: Uint


class Root(Wire, frozen=True):
    """The trust of a fleet: which keys may replace this record and which may publish. Pinned when a device enrols."""

    v: First
    fleet: Label
    version: Positive
    expires: Uint
    root_keys: Annotated[list[Key], Meta(min_length=1, max_length=8)]
    publishers: Annotated[list[PublisherKey], Meta(max_length=32)]


class RootMessage(Wire, frozen=True):
    """One root record on `fl/root/<version>`, signed by a key of the root before it and by one of its own.

    Both payloads are the same; where the two roots share a key, so may be the signatures.
    """

    v: Literal[2]
    before: Signed
    own: Signed


class TensorSpec(Wire, frozen=True):
    """One parameter or buffer; the layout is a list of these, in flat order."""

    name: Label
    kind: Literal["parameter", "buffer"]
    dtype: Literal["float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    shape: Shape


class Sgd(Wire, frozen=True, tag="sgd", tag_field="kind"):
    """torch.optim.SGD."""

    lr: Above
    momentum: Fraction = 0.0
    weight_decay: NotBelow = 0.0


class Adam(Wire, frozen=True, tag="adam", tag_field="kind"):
    """torch.optim.Adam."""

    lr: Above
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: Above = 1e-8
    weight_decay: NotBelow = 0.0


class Training(Wire, frozen=True):
    """What a device does with its data in one round: exactly one of `epochs` and `steps` is above 0."""

    optimizer: Sgd | Adam
    batch_size: Annotated[int, Meta(ge=1, le=65_536)]
    epochs: Annotated[int, Meta(ge=0, le=10_000)] = 0
    steps: Annotated[int, Meta(ge=0, le=10_000_000)] = 0
    gradient_clip: NotBelow = 0.0
    """L2 norm that each step's gradient is clipped to; 0 means not clipped."""
    holdout: Annotated[float, Meta(ge=0.0, le=0.9)] = 0.2
    """Share of the local examples that is never trained on and gives the metrics."""


class FedAvg(Wire, frozen=True, tag="fedavg", tag_field="kind"):
    """Weighted mean of deltas (McMahan 2017): by examples up to `cap` for each device, or uniform."""

    weights: Literal["examples", "uniform"] = "examples"
    cap: Positive = 10_000


class MeanServer(Wire, frozen=True, tag="mean", tag_field="kind"):
    """The aggregator adds `lr` times the mean delta to the weights."""

    lr: Above = 1.0


class ClippedMean(Wire, frozen=True, tag="clipped_mean", tag_field="kind"):
    """Every delta's L2 norm is bounded by the offer's clip, on the device and again on the aggregator."""


class TensorContract(Wire, frozen=True):
    """One array of a data set, without the batch dimension. `classes` > 0 means whole numbers in [0, classes)."""

    name: Label
    dtype: Literal["float32", "float64", "int64", "int32", "uint8", "bool"]
    shape: Shape
    classes: Uint = 0


class DataContract(Wire, frozen=True):
    """What a device's data must look like for this task."""

    dataset: Name
    inputs: Annotated[list[TensorContract], Meta(min_length=1, max_length=16)]
    target: TensorContract
    min_examples: Positive = 1


class Gate(Wire, frozen=True):
    """When a release is clearly worse than its parent, by what the updates that start from each report of it."""

    drop: Fraction = 0.25
    """A share (accuracy) that falls by more than this is clearly worse."""
    ratio: Annotated[float, Meta(ge=1.0, le=1e12)] = 2.0
    """An error (loss, rmse) that grows to more than this multiple is clearly worse."""
    reporters: Annotated[int, Meta(ge=1, le=1_000_000)] = 3
    """Updates with metrics, of either release, below which nothing is judged."""


class Plan(Wire, frozen=True):
    """The round contract; see aggregator.round for what each value does."""

    goal: Annotated[int, Meta(ge=1, le=1_000_000)]
    min_updates: Annotated[int, Meta(ge=1, le=1_000_000)]
    rounds: Annotated[int, Meta(ge=1, le=10_000_000)]
    deadline: Annotated[int, Meta(ge=1, le=10_000_000)]
    """Seconds from a round's opening to its closing with at least `min_updates`."""
    max_extension: Annotated[int, Meta(ge=1, le=10_000_000)] = 86_400
    over_select: Annotated[float, Meta(ge=1.0, le=100.0)] = 1.3
    max_staleness: Literal[0] = 0
    start_jitter: Annotated[int, Meta(ge=0, le=86_400)] = 0
    """Devices spread their start over this many seconds."""
    until: Annotated[float, Meta(ge=-1e12, le=1e12)] | UnsetType = UNSET
    """The value of the task's metric at which the task is done before its last round. Since protocol 2."""
    gate: Gate | UnsetType = UNSET
    """Without one no release is judged. Since protocol 2."""


class PrivacyNone(Wire, frozen=True, tag="none", tag_field="kind"):
    """No differential privacy. `clip_max` is the highest clip bound that an offer may choose."""

    clip_max: Above


class Conditions(Wire, frozen=True):
    """What the publisher asks of a device beyond its owner's policy, which may be stricter and is never loosened."""

    mains: bool = False
    idle: bool = False
    min_battery: Annotated[int, Meta(ge=0, le=100)] = 0
    idle_user: bool | UnsetType = UNSET
    """Nobody uses the device. True or absent. Since protocol 2."""
    unmetered: bool | UnsetType = UNSET
    """The network does not count bytes. True or absent. Since protocol 2."""

    def __post_init__(self) -> None:
        if self.idle_user is False or self.unmetered is False:
            raise ValueError("idle_user and unmetered are true or absent")

    @property
    def grown(self) -> bool:
        """Whether this says what protocol 1 could not."""
        return self.idle_user is not UNSET or self.unmetered is not UNSET


class VerificationKey(Wire, frozen=True):
    """A key of the aggregator and what it may sign."""

    key: Key
    uses: Annotated[list[Use], Meta(min_length=1, max_length=3)]


class TaskManifest(Wire, frozen=True):
    """What is learnt and how: signed by a publisher; everything later must continue it."""

    v: Version
    task: Name
    version: Positive
    expires: Uint
    opset: Positive
    train_graph: Digest
    eval_graph: Digest
    layout: Annotated[list[TensorSpec], Meta(min_length=1, max_length=10_000)]
    training: Training
    algorithm: FedAvg
    server: MeanServer
    data: DataContract
    plan: Plan
    codec: Literal["fp32"]
    rule: ClippedMean
    privacy: PrivacyNone
    conditions: Conditions
    aggregator_keys: Annotated[list[VerificationKey], Meta(min_length=1, max_length=16)]
    metric: Metric = "loss"
    """What the hold-out is judged by; `loss` is always reported too."""

    def __post_init__(self) -> None:
        grown = self.plan.until is not UNSET or self.plan.gate is not UNSET or self.conditions.grown
        _needs(self.v, grown, "until, gate, idle_user and unmetered")


class BlobRef(Wire, frozen=True):
    """Content-addressed bytes; `chunks` are the hashes of its pieces of `chunk_size` (empty: it travels whole)."""

    sha256: Digest
    size: Uint
    chunk_size: Uint = 0
    chunks: Annotated[list[Digest], Meta(max_length=1_000_000)] = []
    urls: Annotated[list[Text], Meta(max_length=8)] = []

    def __post_init__(self) -> None:
        if len(self.chunks) != (-(-self.size // self.chunk_size) if self.chunk_size else 0):
            raise ValueError(f"{len(self.chunks)} chunks of {self.chunk_size} bytes for a blob of {self.size}")


class Release(Wire, frozen=True):
    """A numbered version of a task's weights. Number 0 is the publisher's, later ones the aggregator's."""

    v: Version
    task: Name
    manifest: Digest
    number: Uint
    parent: Digest | None
    weights: BlobRef
    control_variate: BlobRef | None
    delta: BlobRef | None
    metrics: Metrics
    """What the updates that made this release reported of its parent."""
    privacy_spent: None
    restores: Digest | None

    def __post_init__(self) -> None:
        blobs = (self.weights, self.control_variate, self.delta)
        _needs(self.v, any(blob is not None and blob.chunk_size for blob in blobs), "blobs in chunks")


class OfferState(StrEnum):
    """Devices train only on an open offer."""

    OPEN = "open"
    CLOSED = "closed"
    FINISHED = "finished"


class RoundOffer(Wire, frozen=True):
    """The opening, closing or end of the collecting of updates on one release."""

    v: First
    task: Name
    manifest: Digest
    release: Digest
    round: Positive
    sequence: Uint
    state: OfferState
    participation: Annotated[int, Meta(ge=0, le=PARTICIPATION_ALL)]
    clip: Above
    shards: Annotated[int, Meta(ge=1, le=65_536)]
    suite: Literal["x25519"]
    hpke_key: Annotated[bytes, Meta(min_length=32, max_length=2048)]
    deadline: Uint


class Graphs(Wire, frozen=True):
    """Both graphs as shared.graph encodes them."""

    train: bytes
    eval: bytes


class ReleaseMessage(Wire, frozen=True):
    """What travels on `models/release` and `models/<task>/release`. Signed records alone are an announcement.

    Graphs without weights: the weights travel in chunks (protocol 2).
    """

    v: Version
    manifest: Signed
    release: Signed
    graphs: Graphs | None = None
    weights: bytes | None = None

    def __post_init__(self) -> None:
        _needs(self.v, self.graphs is not None and self.weights is None, "weights in chunks")


# -- updates -----------------------------------------------------------------------------------------------------


class UpdateContext(Wire, frozen=True):
    """All of a head that is known before sealing; its canonical bytes are bound into the encryption."""

    v: First
    task: Name
    manifest: Digest
    release: Digest
    round: Positive
    device: Name
    report: ReportId
    mode: Literal["plain"]
    k_min: Literal[0]
    codec: Literal["fp32"]
    dimension: Positive


class UpdateHead(Wire, frozen=True):
    """What a device signs: the context, how the body was sealed, and the certificate that ties it to the device."""

    v: Version
    context: Annotated[bytes, Meta(min_length=1, max_length=4096)]
    encapsulation: Annotated[bytes, Meta(min_length=32, max_length=4096)]
    size: Positive
    sha256: Digest
    chunk_size: Uint
    certificate: Annotated[bytes, Meta(min_length=1, max_length=4096)]
    shares: Annotated[list[bytes], Meta(max_length=0)]

    def __post_init__(self) -> None:
        _needs(self.v, self.chunk_size > 0, "a body in chunks")


class UpdateMessage(Wire, frozen=True):
    """A head, its ECDSA P-256 signature by the device, and a small body, which rides outside the signed bytes.

    Without the body the aggregator asks for its chunks (protocol 2).
    """

    v: Version
    head: Annotated[bytes, Meta(min_length=1, max_length=16_384)]
    sig: Annotated[bytes, Meta(min_length=8, max_length=128)]
    body: bytes | None = None

    def __post_init__(self) -> None:
        _needs(self.v, self.body is None, "a body in chunks")


class Missing(Wire, frozen=True):
    """The aggregator asks a device for chunks of a body; `head` is the digest of the update's head."""

    v: Literal[2]
    head: Digest
    chunks: Annotated[list[Uint], Meta(min_length=1, max_length=MISSING_MAX)]
    """Their numbers, counted from 0, rising."""

    def __post_init__(self) -> None:
        if any(later <= earlier for earlier, later in itertools.pairwise(self.chunks)):
            raise ValueError("the numbers of missing chunks do not rise")


class PlainBody(Wire, frozen=True):
    """The sealed part of an update in plain mode; the encoded delta follows this header (see shared.sealing)."""

    examples: Annotated[int, Meta(ge=1, le=10**9)]
    steps: Annotated[int, Meta(ge=1, le=10**9)]
    metrics: Metrics
    holdout: Annotated[int, Meta(ge=0, le=10**9)]
    """Examples behind `metrics`, which describe the release that the update started from."""


class Outcome(StrEnum):
    """What became of an update; an identical head always gets its original outcome."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    LATE = "late"
    NOT_SELECTED = "not_selected"
    SUPERSEDED = "superseded"
    REJECTED = "rejected"
    UNKNOWN = "unknown"


class Receipt(Wire, frozen=True):
    """The aggregator's word on one head."""

    v: First
    head: Digest
    task: Name
    round: Positive
    device: Name
    outcome: Outcome
    reason: Text = ""


# -- presence ----------------------------------------------------------------------------------------------------


class DeviceStatus(Wire, frozen=True):
    """Retained; also the will. `session` keeps a late will from erasing a newer birth.

    `v` says what the device understands: it is 2 once the device has met a task that needs protocol 2.
    """

    v: Version
    session: SessionId
    online: bool
    version: Label
    opsets: Annotated[list[Positive], Meta(max_length=16)]
    eligible: bool
    obstacles: Annotated[list[Label], Meta(max_length=64)]
    datasets: Annotated[list[Name], Meta(max_length=256)]
    sent: Uint = 0
    """When this was written, by the device's clock; the aggregator ignores what is over 13 h old."""


class AggregatorStatus(Wire, frozen=True):
    """Retained; also the will."""

    v: First
    session: SessionId
    online: bool
    version: Label


def _needs(version: int, used: bool, what: str) -> None:
    if (version == 2) != used:
        raise ValueError(f"{what}: {'not in protocol 1' if used else 'absent, so this is protocol 1'}")
