"""A release file: building one from a PyTorch module, a loss and a task file, and reading one back.

The file is the canonical ReleaseMessage: manifest and release number 0, signed by a publisher, with graphs and weights
inside; the weights are its last part and always whole, also where they travel in chunks. Reading checks all that a
device checks and makes no copy of large weights. torch is imported only while building, and only by aggregator.export.
"""

import functools
import hashlib
import importlib
import importlib.util
import inspect
import mmap
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import UNSET, Struct, structs

from aggregator import task as task_file
from shared import chunks, cli, graph, identity, layout, signing, tensors, trust, wire
from shared.errors import ExportError, Reason, RemoteProtocolError
from shared.messages import (
    Graphs,
    Release,
    ReleaseMessage,
    Role,
    Root,
    TaskManifest,
    TensorContract,
    TensorSpec,
    Use,
    VerificationKey,
)
from shared.opset import OPSET_VERSION

OWN_LOSS = "own"
"""Instead of a loss: the module computes it, forward(*inputs, target) in train mode."""

FILE_MAX = 4 << 30
"""Bytes of a release file that are read at all."""

_WEIGHTS = b"\xa7weights\xc6"
"""Before the length (4 bytes) of weights of at least 65,536 bytes."""


@dataclass(frozen=True, slots=True)
class FleetKeys:
    """What signs a release and whom it trusts."""

    root: Root
    publisher: Ed25519PrivateKey
    aggregator: bytes
    """Raw Ed25519 public key that may sign this task's offers, later releases and receipts."""


@dataclass(frozen=True, slots=True)
class Description:
    """A release file that was read and found whole.

    `message` is what travels on the release topics: without the weights where those travel in chunks. `weights` are all
    of them, or None where they came without; the memory is that of the file.
    """

    message: ReleaseMessage
    weights: memoryview | None
    manifest: TaskManifest
    release: Release
    size: int
    verified: bool
    """Whether the signatures were checked against a root; else only that the parts belong together."""

    def facts(self) -> dict[str, object]:
        """What `aggregator release show` prints."""
        manifest, release = self.manifest, self.release
        optimizer = {"optimizer": type(manifest.training.optimizer).__name__.lower()} | _fields(
            manifest.training.optimizer
        )
        train = graph.parse(self.message.graphs.train) if self.message.graphs else None
        parameters = sum(layout.size(one) for one in manifest.layout if one.kind == "parameter")
        return {
            "task": manifest.task,
            "version": manifest.version,
            "number": release.number,
            "signatures": "verified" if self.verified else "not checked (no root given)",
            "signed_by": f"{self.message.release.role} {self.message.release.key.hex()}",
            "expires": cli.moment(manifest.expires),
            "manifest": signing.digest(self.message.manifest),
            "release": signing.digest(self.message.release),
            "bytes": self.size,
            "model": {
                "parameters": parameters,
                "tensors": len(manifest.layout),
                "weights_bytes": release.weights.size,
                "weights_sha256": release.weights.sha256,
                "chunks": len(release.weights.chunks),
                "opset": manifest.opset,
                "train_rows": len(train.rows) if train else None,
            },
            "training": optimizer | {k: v for k, v in _fields(manifest.training).items() if k != "optimizer"},
            "data": {
                "dataset": manifest.data.dataset,
                "inputs": [_array(one) for one in manifest.data.inputs],
                "target": _array(manifest.data.target),
                "min_examples": manifest.data.min_examples,
            },
            "plan": _fields(manifest.plan),
            "metric": manifest.metric,
            "clip_max": manifest.privacy.clip_max,
            "weights": manifest.algorithm.weights,
            "conditions": _fields(manifest.conditions),
            "metrics": dict(release.metrics),
        }


def fleet_keys(fleet: Path, passphrase: Callable[[Path], bytes | None]) -> FleetKeys:
    """The keys in a fleet folder; `passphrase` is asked only where the publisher's key is encrypted."""
    key = fleet / "publisher" / "publisher.key"
    secret = passphrase(key) if identity.is_encrypted(key) else None
    return FleetKeys(
        root=identity.load_root(fleet / "root" / "root.msgpack"),
        publisher=identity.load_signing_key(key, secret),
        aggregator=identity.load_signing_public(fleet / "aggregator" / "signing.pub"),
    )


def build(
    model: str,
    loss: str,
    task: Path,
    keys: FleetKeys,
    *,
    now: float,
    limit: int = wire.MESSAGE_MAX,
    seed: int = 0,
    chunk_size: int = chunks.CHUNK_SIZE,
    start: Description | None = None,
) -> bytes:
    """The bytes of a signed release file.

    `model` names a module as "package.module:attribute" or "file.py:attribute" (an nn.Module's class, instance or a
    function without arguments that gives one). `loss` is the name of one of aggregator.export's, OWN_LOSS, or names a
    module of the publisher's in the same way. `seed` fixes the initial weights that PyTorch draws; with `start` those
    of that release take their place. Weights above 64 KiB are cut into chunks of `chunk_size` bytes (0: never, they
    travel whole, which devices before 0.2 need); one message takes `limit` bytes.

    Raises ExportError for a model, loss or size that cannot be released and ConfigError for the task file or the keys.
    """
    from aggregator import export

    described = task_file.load(task)
    with export.seeded(seed):
        module = export.module(load(model), model)
        criterion = export.module(load(loss), loss) if ":" in loss else None if loss == OWN_LOSS else loss
    exported = export.export(module, criterion, described.data.inputs, described.data.target)
    weights = exported.weights if start is None else _continued(start, described, exported.layout)
    blob = chunks.describe(weights, chunk_size if len(weights) > chunks.INLINE_MAX else 0)
    manifest = task_file.manifest(
        task,
        described,
        now=now,
        opset=OPSET_VERSION,
        train_graph=hashlib.sha256(exported.train).digest(),
        eval_graph=hashlib.sha256(exported.eval).digest(),
        layout=exported.layout,
        aggregator_keys=[VerificationKey(key=keys.aggregator, uses=[Use.OFFER, Use.RELEASE, Use.RECEIPT])],
    )
    manifest_signed = signing.sign(manifest, Role.PUBLISHER, keys.publisher)
    release = Release(
        v=2 if blob.chunks else 1,
        task=manifest.task,
        manifest=signing.digest(manifest_signed),
        number=0,
        parent=None,
        weights=blob,
        control_variate=None,
        delta=None,
        metrics={},
        privacy_spent=None,
        restores=None,
    )
    message = ReleaseMessage(
        v=1,
        manifest=manifest_signed,
        release=signing.sign(release, Role.PUBLISHER, keys.publisher),
        graphs=Graphs(train=exported.train, eval=exported.eval),
        weights=weights,
    )
    data = wire.pack(message)
    size = len(data) - (len(weights) if blob.chunks else 0)
    if size > limit:
        raise ExportError(
            f"the release's message has {size} bytes ({0 if blob.chunks else len(weights)} of them weights) and one "
            f"message takes {limit}: let the weights travel in chunks (--chunk-size), make the model smaller, or raise "
            "--limit together with max_packet_size in mosquitto.conf and message_max in the aggregator's and the "
            "devices' configuration"
        )
    if len(data) > FILE_MAX:
        raise ExportError(f"the release has {len(data)} bytes and a release file at most {FILE_MAX}")
    _accepted_by_a_device(data, keys.root, now)
    return data


def open_file(path: Path) -> bytes | mmap.mmap:
    """The bytes of a release file, mapped and not read; cli.Failure above FILE_MAX, OSError where it cannot be read."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size > FILE_MAX:
            raise cli.Failure(cli.Exit.FAILED, f"{path} has more than {FILE_MAX} bytes; is it the right file?")
        # Nothing can be mapped of an empty file.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""


def read(data: bytes | bytearray | mmap.mmap, root: Root | None = None, now: float | None = None) -> Description:
    """Check a release file as a device does and describe it; RemoteProtocolError says what does not hold.

    With `root` the signatures are verified, and with `now` (UTC seconds) expiry too; without `root` only the digests
    that tie the parts together, the graphs and the weights.
    """
    message, weights = _split(data)
    if root is None:
        manifest = wire.unpack(message.manifest.payload, TaskManifest)
        release = wire.unpack(message.release.payload, Release)
        if release.task != manifest.task:
            raise RemoteProtocolError(Reason.WRONG_TASK, f"{release.task} under the manifest of {manifest.task}")
        if release.manifest != signing.digest(message.manifest):
            raise RemoteProtocolError(Reason.WRONG_MANIFEST, f"manifest {release.manifest.hex()[:16]}")
    else:
        rules = trust.Trust(root)
        manifest = rules.manifest(message.manifest, 0.0 if now is None else now)
        release = rules.release(message.release, message.manifest, manifest)
    if message.graphs is not None:
        _check_graph(message.graphs.train, "train", manifest.train_graph, manifest)
        _check_graph(message.graphs.eval, "eval", manifest.eval_graph, manifest)
    if release.weights.size > layout.weights_max(manifest.layout):
        raise RemoteProtocolError(Reason.TOO_LARGE, f"weights of {release.weights.size} bytes for this layout")
    if weights is not None:
        check_weights(weights, manifest, release)
    travels = structs.replace(message, weights=None if weights is None else bytes(weights))
    if release.weights.chunks and message.graphs is not None:
        travels = structs.replace(message, v=2, weights=None)
    return Description(travels, weights, manifest, release, len(data), verified=root is not None)


def check_weights(weights: memoryview, manifest: TaskManifest, release: Release) -> None:
    """Refuse weights that are not the release's, whole and in chunks, or not of the manifest's layout."""
    blob, found = release.weights, chunks.describe(weights, release.weights.chunk_size)
    if (found.size, found.sha256) != (blob.size, blob.sha256):
        raise RemoteProtocolError(Reason.WRONG_DIGEST, "the weights are not those that the release names")
    if found.chunks != blob.chunks:
        raise RemoteProtocolError(Reason.WRONG_DIGEST, "the chunks of the weights are not those that the release names")
    tensors.verify(weights, manifest.layout)


def load(spec: str) -> object:
    """The object that "package.module:attribute" or "file.py:attribute" names; a class or function is called.

    This runs the publisher's own code. Raises ExportError naming the line where that code fails.
    """
    place, _, attribute = spec.rpartition(":")
    if not place or not attribute:
        raise ExportError(f"{spec!r} names nothing; write package.module:attribute or file.py:attribute")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        found: object = functools.reduce(getattr, attribute.split("."), module)
        if isinstance(found, type | functools.partial) or inspect.isroutine(found):
            return found()
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        NameError,
        OSError,
        RuntimeError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as error:
        raise ExportError(f"{spec}: {type(error).__name__}: {error}{_where(error)}") from None
    return found


def _split(data: bytes | bytearray | mmap.mmap) -> tuple[ReleaseMessage, memoryview | None]:
    """The message, and its weights over the memory of `data`; where these are large the message holds none of them."""
    at = data.find(_WEIGHTS)
    while at >= 0:
        start = at + len(_WEIGHTS) + 4
        size = int.from_bytes(data[start - 4 : start], "big")
        # Something before them may look like them, but only they end the file.
        if start + size == len(data):
            if size < 1 << 16:
                raise RemoteProtocolError(Reason.NOT_CANONICAL, "the weights in another than their canonical form")
            head = bytes(data[: at + len(_WEIGHTS) - 1]) + wire.pack(b"")
            return wire.unpack(head, ReleaseMessage), memoryview(data)[start:]
        at = data.find(_WEIGHTS, at + 1)
    if len(data) > wire.MESSAGE_MAX:
        raise RemoteProtocolError(Reason.TOO_LARGE, f"{len(data)} bytes that end in no weights")
    message = wire.unpack(bytes(data), ReleaseMessage)
    return message, None if message.weights is None else memoryview(message.weights)


def _continued(start: Description, described: task_file.TaskFile, specs: list[TensorSpec]) -> bytes:
    """The weights of a release for the next version of its task."""
    before = start.manifest
    if start.weights is None:
        raise ExportError(f"release {start.release.number} of {before.task} came without its weights")
    if before.task != described.name:
        raise ExportError(f"--continue gives a release of {before.task}, and the task file is of {described.name}")
    if described.version <= before.version:
        raise ExportError(f"the fleet has version {before.version} of {before.task}: raise `version` in the task file")
    try:
        tensors.verify(start.weights, specs)
    except RemoteProtocolError as error:
        raise ExportError(f"the weights of {before.task} do not fit this model: {error}") from None
    return bytes(start.weights)


def _from_file(path: Path) -> object:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = f"_release_{path.stem}"
    described = importlib.util.spec_from_file_location(name, path)
    if described is None or described.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(described)
    # Dataclasses and pickling in the publisher's file look their module up here; files beside it can be imported.
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        described.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _where(error: BaseException) -> str:
    frames = [one for one in traceback.extract_tb(error.__traceback__) if one.filename != __file__]
    own = [one for one in frames if not one.filename.startswith("<frozen") and "/importlib/" not in one.filename]
    return f" ({Path(own[-1].filename).name} line {own[-1].lineno})" if own else ""


def _check_graph(data: bytes, kind: graph.Kind, digest: bytes, manifest: TaskManifest) -> None:
    if hashlib.sha256(data).digest() != digest:
        raise RemoteProtocolError(Reason.WRONG_DIGEST, f"the {kind} graph is not the one that the manifest names")
    graph.check(graph.parse(data), kind, manifest.layout, manifest.data.inputs, manifest.data.target)


def _accepted_by_a_device(data: bytes, root: Root, now: float) -> None:
    try:
        read(data, root, now)
    except RemoteProtocolError as error:
        match error.reason:
            case Reason.UNKNOWN_KEY:
                advice = "the fleet's root record does not name this publisher key"
            case Reason.EXPIRED:
                advice = "the publisher's key has expired in the fleet's root record"
            case _:
                advice = "devices would refuse this release"
        raise ExportError(f"{advice} ({error})") from None


def _fields(struct: Struct) -> dict[str, object]:
    found = {name: getattr(struct, name) for name in struct.__struct_fields__}
    return {
        name: _fields(each) if isinstance(each, Struct) else each for name, each in found.items() if each is not UNSET
    }


def _array(one: TensorContract) -> str:
    return f"{one.name} {one.dtype}{one.shape}" + (f" below {one.classes}" if one.classes else "")
