"""A round's training, left between two batches: all that the rest of it depends on, in one file. Imports torch.

With the same job, examples and number of threads, training that goes on from a checkpoint gives the same weights, bit
for bit, as training that was never interrupted: weights and buffers, the optimizer's state, torch's generator, and the
sampler's as it was when the epoch began are all in it. The file is SHA-256 || length of the place || place (msgpack) ||
tensors (safetensors); it is replaced whole, and one that is damaged or of other work is as good as none.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import safetensors.torch
import torch
from msgspec import Meta
from safetensors import SafetensorError

from shared import wire
from shared.errors import RemoteProtocolError, TrainingError
from shared.files import write_durably
from shared.messages import Digest, First, Metrics, NotBelow, Uint, Wire

State = dict[str, torch.Tensor]

_LENGTH = struct.Struct("<I")
_DIGEST = 32
_PLACE_MAX = 1 << 20
_FORMAT = 1


class Place(Wire, frozen=True):
    """Where the training stands."""

    v: First
    key: Digest
    """Of the work this belongs to: job, examples, everything that the result depends on."""
    epoch: Uint
    """Counted from 1; the one in hand."""
    batch: Uint
    """Batches of it that are done."""
    step: Uint
    loss_sum: float
    """Of those batches' mean losses."""
    metrics: Metrics
    """Of the weights that the round started from, on the hold-out."""
    seconds: NotBelow = 0.0
    cpu_seconds: NotBelow = 0.0
    """What the work took so far."""
    optimizer: Annotated[list[list[str]], Meta(max_length=10_000)] = msgspec.field(default_factory=list)
    """Names of the state tensors that the optimizer keeps of each parameter; empty before its first step."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`weights` are all tensors of the layout; `optimizer` has a table of tensors for each parameter in order."""

    place: Place
    weights: State
    optimizer: list[State]
    generator: torch.Tensor
    """uint8[n]: state of torch's own generator."""
    order: torch.Tensor
    """uint8[n]: state of the sampler's generator when the epoch began."""


def optimizer_state(optimizer: torch.optim.Optimizer) -> list[State]:
    """What an optimizer remembers of each parameter; all of it is tensors in those we use."""
    return [
        {name: value for name, value in sorted(optimizer.state.get(each, {}).items()) if value is not None}
        for group in optimizer.param_groups
        for each in group["params"]
    ]


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Sequence[State]) -> None:
    """Put back what `optimizer_state` gave."""
    kept = {number: dict(each) for number, each in enumerate(state) if each}
    optimizer.load_state_dict({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Replace the file at `path`, durably; TrainingError("storage") if the disk refuses, and the old one stays."""
    tensors = {f"w/{name}": tensor.detach().contiguous() for name, tensor in checkpoint.weights.items()}
    for number, each in enumerate(checkpoint.optimizer):
        tensors |= {f"o/{number}/{name}": tensor.detach().contiguous() for name, tensor in each.items()}
    tensors |= {"generator": checkpoint.generator, "order": checkpoint.order}
    names = [list(each) for each in checkpoint.optimizer]
    place = wire.pack(msgspec.structs.replace(checkpoint.place, optimizer=names))
    body = _LENGTH.pack(len(place)) + place + safetensors.torch.save(tensors)
    try:
        write_durably(path, hashlib.sha256(body).digest() + body)
    except OSError as error:
        raise TrainingError("storage", f"{path}: {error.strerror}") from None


def read(path: Path, key: bytes, layout: State) -> Checkpoint | None:
    """The checkpoint at `path`, if it is whole, of the work with this `key`, and its weights are shaped as `layout`."""
    try:
        content = memoryview(path.read_bytes())
    except OSError:
        return None
    body = content[_DIGEST:]
    if len(body) < _LENGTH.size or hashlib.sha256(body).digest() != content[:_DIGEST]:
        return None
    (size,) = _LENGTH.unpack(body[: _LENGTH.size])
    try:
        place = wire.unpack(bytes(body[_LENGTH.size : _LENGTH.size + size]), Place, _PLACE_MAX)
        tensors = safetensors.torch.load(bytes(body[_LENGTH.size + size :]))
        weights = {name: tensors[f"w/{name}"] for name in layout}
        optimizer = [
            {name: tensors[f"o/{number}/{name}"] for name in names} for number, names in enumerate(place.optimizer)
        ]
        found = Checkpoint(place, weights, optimizer, tensors["generator"], tensors["order"])
    except (RemoteProtocolError, SafetensorError, KeyError):
        return None
    same = all(
        weights[name].shape == wanted.shape and weights[name].dtype == wanted.dtype for name, wanted in layout.items()
    )
    return found if same and place.key == key else None
