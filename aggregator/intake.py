"""The shell's part for updates: read them, verify and open them, keep the opened numbers, fold and rebuild the fold.

An update's numbers stay here, under the digest of its head, from `open` to `contribute`; the coordinator never sees
them. What counts is decided there and made durable by the service, never here.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from cryptography import x509

from aggregator import coordinator as core
from aggregator import validate
from aggregator.config import Limits
from aggregator.deny import DenyList
from aggregator.fold import Fold, Vector
from aggregator.ports import Blobs, Contribution, Store
from aggregator.quarantine import fingerprint
from aggregator.reassembler import Bounds
from aggregator.round import DUPLICATE, Verdict
from shared import codec, identity, sealing, wire
from shared.driver import read_clock
from shared.errors import LocalProtocolError, Reason, RemoteProtocolError
from shared.events import Event
from shared.identity import VerifiedDevice
from shared.layout import FLOATING, size
from shared.logs import tell
from shared.messages import Outcome, PlainBody, TaskManifest, UpdateContext, UpdateHead, UpdateMessage
from shared.mqtt import Message
from shared.topics import Topics, Upload, update_name


def decode(topics: Topics, message: Message, limit: int) -> core.HeadReceived | core.ChunkReceived:
    """The head or chunk that a message below an upload's topic is; RemoteProtocolError if it is none."""
    upload = topics.parse_upload(message.topic)
    if upload.chunk is not None:
        return core.ChunkReceived(upload.device, upload.update, upload.chunk, message.payload)
    update = wire.unpack(message.payload, UpdateMessage, limit)
    digest = sha256(update.head).digest()
    head = wire.unpack(update.head, UpdateHead)
    context = wire.unpack(head.context, UpdateContext)
    if context.device != upload.device:
        raise RemoteProtocolError(Reason.WRONG_DEVICE, f"{context.device} on the topic of {upload.device}")
    if update_name(digest) != upload.update:
        raise RemoteProtocolError(Reason.WRONG_DIGEST, f"another head than {upload.update}")
    if update.body is None and not head.chunk_size:
        raise RemoteProtocolError(Reason.MISSING_PART, f"{context.device} sent a head without its body")
    if update.body is not None and head.chunk_size:
        raise RemoteProtocolError(Reason.UNASKED, f"{context.device} sent the body of a head in chunks along with it")
    return core.HeadReceived(digest, head, context, update.head, update.sig, update.body)


def chunk_of(topics: Topics, message: Message) -> Upload | None:
    """Whose chunk a message is, if it is one."""
    with contextlib.suppress(RemoteProtocolError):
        upload = topics.parse_upload(message.topic)
        return None if upload.chunk is None else upload
    return None


def suspicion(topics: Topics, message: Message) -> str:
    """What a message is called that may kill the process.

    An update in chunks does so as a whole, whichever of them comes last and however often it is sent.
    """
    upload = chunk_of(topics, message)
    return fingerprint(message) if upload is None else f"{upload.device} {upload.update}"


class Intake:
    """What the owner thread holds of updates between the link and the store."""

    def __init__(
        self,
        store: Store,
        blobs: Blobs,
        ca: Sequence[x509.Certificate],
        deny: DenyList,
        key_file: Callable[[str, int, int], Path],
        counts: Counter[str],
    ) -> None:
        """`key_file` names the private key of (task, manifest version, round); `counts` are the daemon's."""
        self._store, self._blobs, self._ca, self._deny = store, blobs, ca, deny
        self._key_file, self._counts = key_file, counts
        self.folds: dict[tuple[str, int, int], Fold] = {}
        self.opened: dict[bytes, Vector] = {}
        """The numbers of opened updates that no contribution has taken, by the digest of their head."""
        self.recorded: set[bytes] = set()
        """Heads whose rows the newest commit wrote."""

    def admit(self, effect: core.Admit) -> core.HeadAdmitted | core.HeadSpoilt:
        """Everything that a head must be before anything is spent on its body, cheapest first."""
        try:
            self._check_head(effect.received, effect.opened, effect.manifest)
        except RemoteProtocolError as error:
            return self._spoilt(effect.received, error)
        return core.HeadAdmitted(effect.received)

    def open(self, effect: core.Open) -> core.UpdateOpened | core.HeadSpoilt | core.UpdateSpoilt:
        """The body: as signed, sealed for this context, and with numbers that may be added."""
        received, manifest = effect.received, effect.manifest
        head, context = received.head, received.context
        if received.body is None:
            raise LocalProtocolError(f"an update of {context.device} was opened without its body")
        try:
            if effect.opened is not None:
                self._check_head(received, effect.opened, manifest)
            else:
                # Again: its chunks may have taken a while, and the list is about now.
                self._check_deny_list(context.device)
            if len(received.body) != head.size or sha256(received.body).digest() != head.sha256:
                raise RemoteProtocolError(Reason.WRONG_DIGEST, "the body is not the one that the head was signed for")
        except RemoteProtocolError as error:
            return self._spoilt(received, error)
        try:
            body, data = self._unseal(manifest.version, head, context, received.body)
            validate.report(body, manifest.metric)
            self.opened[received.digest] = validate.delta(context.codec, data, sizes_of(manifest), effect.clip)
        except RemoteProtocolError as error:
            return core.UpdateSpoilt(received, error)
        return core.UpdateOpened(received, body)

    def _spoilt(self, received: core.HeadReceived, error: RemoteProtocolError) -> core.HeadSpoilt:
        """A head that does not hold; not for good if only the date stands against its certificate."""
        dated = error.reason is Reason.BAD_CERTIFICATE and identity.was_or_will_be(received.head.certificate, self._ca)
        return core.HeadSpoilt(received, error, passing=dated)

    def _check_head(self, received: core.HeadReceived, opened: float, manifest: TaskManifest) -> None:
        head, context = received.head, received.context
        self._check_deny_list(context.device)
        device = self._certified(head.certificate, opened)
        if device.name != context.device:
            raise RemoteProtocolError(Reason.WRONG_DEVICE, f"the certificate is of {device.name}")
        identity.verify_head(device.public_key, received.signed, received.signature)
        sizes = sizes_of(manifest)
        if (context.codec, context.dimension) != (manifest.codec, sum(sizes)):
            raise RemoteProtocolError(Reason.WRONG_DIMENSION, f"{context.dimension}, the task has {sum(sizes)}")
        most = sealing.sealed_size(sealing.HEADER_MAX, codec.size_max(context.codec, sizes))
        if head.size > most:
            raise RemoteProtocolError(Reason.TOO_LARGE, f"a body of {head.size} bytes, at most {most}")

    def _certified(self, certificate: bytes, opened: float) -> VerifiedDevice:
        """Whom a certificate names that was valid when the round opened; or is now, if the clock was wrong then."""
        try:
            return identity.verify_device(certificate, self._ca, opened)
        except RemoteProtocolError:
            return identity.verify_device(certificate, self._ca, read_clock().utc)

    def _check_deny_list(self, device: str) -> None:
        if self._deny.has(device):
            raise RemoteProtocolError(Reason.DENIED, f"{device} is on the deny list")

    def _unseal(
        self, version: int, head: UpdateHead, context: UpdateContext, body: bytes | memoryview
    ) -> tuple[PlainBody, memoryview]:
        private = self._key_file(context.task, version, context.round).read_bytes()
        return sealing.open_sealed(private, head.encapsulation, body, head.context)

    def contribute(self, effect: core.Contribute) -> None:
        """Add an update, which its row has made durable, to the fold of its round."""
        received = effect.received
        context = received.context
        delta = self.opened.pop(received.digest)
        if received.digest not in self.recorded:
            raise LocalProtocolError(f"{context.device} is in the store for round {context.round} already")
        key = (context.task, effect.manifest_version, context.round)
        fold = self.folds.setdefault(key, Fold(len(delta)))
        fold.add(received.digest, delta, effect.weight)
        self._counts["updates_accepted"] += 1
        self._counts["update_bytes"] += received.head.size
        tell(
            Event.UPDATE_ACCEPTED,
            **where(context),
            examples=effect.body.examples,
            bytes=received.head.size,
            updates=f"{effect.updates}/{effect.goal}",
        )

    def recall(self, effect: core.Recall) -> core.HeadRecalled:
        """What the store says of a head of an earlier round or manifest."""
        received = effect.received
        context = received.context
        if effect.manifest_version is None:
            row = self._store.recall_head(context.task, context.round, context.device, received.digest)
        else:
            row = self._store.recall(context.task, effect.manifest_version, context.round, context.device)
        if row is None:
            return core.HeadRecalled(received, None)
        same = row.head_digest == received.digest
        return core.HeadRecalled(received, Verdict(Outcome(row.outcome), row.reason) if same else DUPLICATE)

    def fold(self, manifest: TaskManifest, number: int, rows: Sequence[Contribution]) -> Fold:
        """The round's fold; made again from rows and blobs where memory does not hold exactly what the rows say."""
        key = (manifest.task, manifest.version, number)
        fold = self.folds.get(key)
        if fold is not None and fold.heads == [row.head_digest for row in rows]:
            return fold
        sizes = sizes_of(manifest)
        fold = Fold(sum(sizes))
        for row in rows:
            head = wire.unpack(row.head, UpdateHead)
            context = wire.unpack(head.context, UpdateContext)
            _, data = self._unseal(manifest.version, head, context, self._blobs.get(row.body))
            fold.add(row.head_digest, codec.decode(context.codec, data, sizes), row.weight)
        self.folds[key] = fold
        tell(Event.FOLD_REBUILT, task=manifest.task, round=number, updates=len(rows))
        return fold


def sizes_of(manifest: TaskManifest) -> list[int]:
    """Elements of each tensor that a delta has, in flat order."""
    return [size(spec) for spec in manifest.layout if spec.dtype in FLOATING]


def bounds(limits: Limits) -> Bounds:
    """What updates in chunks may cost, as configured."""
    return Bounds(
        updates=limits.updates,
        size=limits.update_bytes,
        device_updates=limits.device_updates,
        device_size=limits.device_update_bytes,
        waiting=limits.waiting_updates,
        asked=limits.asked_chunks,
        patience=limits.chunk_timeout / 2,
        silence=float(limits.chunk_timeout),
        timeout=float(limits.update_timeout),
    )


def where(context: UpdateContext) -> dict[str, object]:
    """The fields of a line about an update."""
    return {"task": context.task, "round": context.round, "device": context.device}


def counted(effect: core.Contribute, now: float) -> Contribution:
    """The row that makes an update count."""
    row = _row(effect, now)
    return replace(
        row,
        seq=effect.sequence,
        weight=effect.weight,
        examples=effect.body.examples,
        holdout=effect.body.holdout,
        metrics=effect.body.metrics,
        head=effect.received.signed,
        body=effect.received.head.sha256,
    )


def rejected(effect: core.Reject, now: float) -> Contribution:
    """The row that says why a device's update does not count; its head and body are kept nowhere."""
    return replace(_row(effect, now), outcome=Outcome.REJECTED.value, reason=effect.reason.value)


def _row(effect: core.Contribute | core.Reject, now: float) -> Contribution:
    received = effect.received
    context = received.context
    return Contribution(
        task=context.task,
        manifest_version=effect.manifest_version,
        origin_round=context.round,
        device=context.device,
        collected_in=context.round,
        head_digest=received.digest,
        seq=0,
        weight=0.0,
        examples=0,
        holdout=0,
        metrics={},
        head=b"",
        body=b"",
        at=now,
    )
