"""What the agent and its trainer child say to each other: frozen structs in length-prefixed frames over pipes.

The agent imports this module, so it must never import torch or numpy. Nothing here is secret: no key of the device
ever crosses the pipe.
"""

import struct
from typing import Annotated, Literal, Protocol

from msgspec import Meta

from shared import wire
from shared.errors import Reason, RemoteProtocolError
from shared.messages import (
    DataContract,
    Digest,
    First,
    Label,
    Metric,
    Metrics,
    Name,
    NotBelow,
    Positive,
    TensorSpec,
    Text,
    Training,
    Uint,
    Wire,
)

ORDER_MAX = 8 << 20
"""Bytes of one frame to the trainer; a layout of 10,000 tensors with long names is below 3 MB."""

SAID_MAX = 64 << 10
"""Bytes of one frame from the trainer."""

FailureReason = Literal[
    "data", "graph", "weights", "unsupported", "not_finite", "out_of_memory", "storage", "cancelled"
]

Path = Annotated[str, Meta(min_length=1, max_length=4096)]


class Source(Wire, frozen=True):
    """Where a data set lies: a file, or a folder of files, of this kind."""

    kind: Literal["npz", "csv"]
    path: Path


class Job(Wire, frozen=True, tag="job"):
    """One round's work for the trainer. Paths are absolute; `output` is where the sealed body must appear."""

    id: Label
    task: Label
    opset: Positive
    layout: Annotated[list[TensorSpec], Meta(min_length=1, max_length=10_000)]
    train_graph: Path
    eval_graph: Path
    weights: Path
    training: Training
    data: DataContract
    source: Source
    metric: Metric
    seed: Uint
    clip: Annotated[float, Meta(gt=0.0)]
    """Bound of the delta's L2 norm."""
    codec: Literal["fp32"]
    hpke_key: Annotated[bytes, Meta(min_length=32, max_length=2048)]
    context: Annotated[bytes, Meta(min_length=1, max_length=4096)]
    """The canonical UpdateContext that the body is bound to."""
    output: Path
    threads: Annotated[int, Meta(ge=1, le=1024)] = 1
    checkpoint: Path | None = None
    """Where checkpoints of this job are written, and one that is there already is gone on from."""
    checkpoint_every: Annotated[float, Meta(ge=0.0, le=604_800.0)] = 0.0
    """Seconds between two checkpoints; 0: only when it is suspended."""


class LeftJob(Wire, frozen=True):
    """All that makes a job the same one when it is gone on with, as the agent keeps it on disk; no message."""

    v: First
    id: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
    """Its report's."""
    task: Name
    position: tuple[Uint, Uint]
    """(manifest version, round)."""
    release: Digest
    """Of the release it trains from."""
    context: Annotated[bytes, Meta(min_length=1, max_length=4096)]
    """As in Job."""
    seed: Uint


class Judge(Wire, frozen=True, tag="judge"):
    """Judge a release's weights on this device's hold-out, and beside them those in use, if there are any."""

    id: Label
    opset: Positive
    layout: Annotated[list[TensorSpec], Meta(min_length=1, max_length=10_000)]
    train_graph: Path
    eval_graph: Path
    weights: Path
    before: Path | None
    """Weights of the same layout."""
    data: DataContract
    source: Source
    metric: Metric
    holdout: Annotated[float, Meta(ge=0.0, lt=1.0)]
    batch_size: Positive
    threads: Annotated[int, Meta(ge=1, le=1024)] = 1


class Cancel(Wire, frozen=True, tag="cancel"):
    """The job with this id, if it is not finished, is not wanted any more: Failed("cancelled") is soon its answer.

    Done may still be the answer, when the job was at its end. For any other id a cancel does nothing.
    """

    id: Label


class Suspend(Wire, frozen=True, tag="suspend"):
    """The job with this id is to be left: Suspended is soon its answer, with a checkpoint if it has begun to train.

    Done may still be the answer, when the job was at its end. For any other id it does nothing.
    """

    id: Label


class Order(Wire, frozen=True):
    """A frame to the trainer. The end of the stream means: finish and exit."""

    message: Job | Judge | Cancel | Suspend


class Progress(Wire, frozen=True, tag="progress"):
    """Where a job stands: at most about one a second, and one at the end of every epoch."""

    id: Label
    phase: Literal["loading", "evaluating", "training", "sealing"]
    epoch: Uint = 0
    epochs: Uint = 0
    """0 when the task counts steps instead."""
    step: Uint = 0
    steps: Uint = 0
    loss: float | None = None
    """Mean training loss since the epoch began."""


class Done(Wire, frozen=True, tag="done"):
    """The sealed body lies at the job's `output`."""

    id: Label
    encapsulation: Annotated[bytes, Meta(min_length=32, max_length=4096)]
    size: Positive
    sha256: Digest
    examples: Positive
    steps: Positive
    holdout: Uint
    metrics: Metrics
    """Of the release the job started from, on the local hold-out; also inside the sealed body."""
    loss: float
    """Mean training loss of the last epoch."""
    norm: NotBelow
    """L2 norm of the delta before it was clipped."""
    seconds: NotBelow
    cpu_seconds: NotBelow
    peak_rss: Uint
    """Bytes, the highest of this process so far."""


class Failed(Wire, frozen=True, tag="failed"):
    """The job cannot be done, and why; the trainer lives on and takes the next one."""

    id: Label
    reason: FailureReason
    detail: Text


class Suspended(Wire, frozen=True, tag="suspended"):
    """The job was left; the same one, given again, goes on from its checkpoint, or anew if there is none."""

    id: Label
    kept: bool
    """Whether there is a checkpoint."""


class Judged(Wire, frozen=True, tag="judged"):
    """How good weights are on this device's hold-out: metrics by name."""

    id: Label
    examples: Uint
    """In the hold-out."""
    metrics: Metrics
    before: Metrics
    """Of the weights in use; empty if there are none."""


Word = Progress | Done | Failed | Suspended | Judged


class Said(Wire, frozen=True):
    """A frame from the trainer."""

    message: Word


class Readable(Protocol):
    """A binary stream whose read(n) returns fewer than n bytes only at its end."""

    def read(self, size: int, /) -> bytes | None: ...


_LENGTH = struct.Struct("<I")


def frame(message: Order | Said) -> bytes:
    """The bytes of one frame."""
    body = wire.pack(message)
    return _LENGTH.pack(len(body)) + body


def read_order(stream: Readable) -> Job | Judge | Cancel | Suspend | None:
    """The next order, or None at the end of the stream; RemoteProtocolError for anything else."""
    body = _read(stream, ORDER_MAX)
    return None if body is None else wire.unpack(body, Order, ORDER_MAX).message


def read_said(stream: Readable) -> Word | None:
    """What the trainer said next, or None at the end of the stream; RemoteProtocolError for anything else."""
    body = _read(stream, SAID_MAX)
    return None if body is None else wire.unpack(body, Said, SAID_MAX).message


def _read(stream: Readable, limit: int) -> bytes | None:
    prefix = stream.read(_LENGTH.size) or b""
    if not prefix:
        return None
    if len(prefix) < _LENGTH.size:
        raise RemoteProtocolError(Reason.NOT_MSGPACK, "the stream ends inside a frame's length")
    (size,) = _LENGTH.unpack(prefix)
    if size > limit:
        raise RemoteProtocolError(Reason.TOO_LARGE, f"a frame of {size} bytes, the limit is {limit}")
    body = stream.read(size) or b""
    if len(body) < size:
        raise RemoteProtocolError(Reason.NOT_MSGPACK, f"the stream ends {size - len(body)} bytes before its frame")
    return body
