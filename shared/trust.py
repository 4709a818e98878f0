"""Who may sign what, and in which order it may arrive: the rules, without files or sockets.

root (pinned) -> publisher (manifests, release 0) -> aggregator (offers, later releases, receipts, with keys that the
publisher's manifest names). So a stolen aggregator can only continue what a publisher began.

Order: (manifest version, release number) and (manifest version, round, sequence) only rise; the same position with
another digest is equivocation. `Position` says which of the three a record is.
"""

from dataclasses import dataclass
from hashlib import sha256

from shared import graph, signing, wire
from shared.errors import Reason, RemoteProtocolError
from shared.layout import weights_max
from shared.messages import (
    Graphs,
    OfferState,
    Receipt,
    Release,
    ReleaseMessage,
    Role,
    Root,
    RootMessage,
    RoundOffer,
    Signed,
    TaskManifest,
    Use,
)
from shared.opset import OPSET_VERSION

KEY_SIZE = 32
"""Bytes of a round's public key of the suite x25519."""


def open_root(signed: Signed) -> Root:
    """The root record inside, once one of its own root keys signed it; pinning it is the caller's decision."""
    # The keys are inside the record itself: this proves only that the bytes are whole; the pin proves the rest.
    claimed = wire.unpack(signed.payload, Root)
    return signing.verify(signed, Root, Role.ROOT, claimed.root_keys)


def next_root(current: Root, message: RootMessage) -> Root:
    """The root that follows `current`: version one higher, same fleet, signed by a key of each; walked one by one.

    Expiry is for the caller to judge once no newer root is found, so that a device may sleep through several.
    """
    if message.before.payload != message.own.payload:
        raise RemoteProtocolError(Reason.WRONG_DIGEST, "two different roots in one message")
    found = signing.verify(message.before, Root, Role.ROOT, current.root_keys)
    open_root(message.own)
    if found.fleet != current.fleet:
        raise RemoteProtocolError(Reason.WRONG_TASK, f"a root of the fleet {found.fleet}")
    if found.version != current.version + 1:
        raise RemoteProtocolError(Reason.ROLLBACK, f"root {found.version} after {current.version}")
    return found


@dataclass(frozen=True, slots=True)
class Trust:
    """The rules under one pinned root. Every method verifies before it parses and raises RemoteProtocolError."""

    root: Root

    def manifest(self, signed: Signed, now: float) -> TaskManifest:
        """A publisher's manifest that has not expired at `now` (seconds UTC)."""
        manifest = self.published(signed, now)
        if now >= manifest.expires:
            raise RemoteProtocolError(Reason.EXPIRED, f"manifest {manifest.version} of {manifest.task}")
        return manifest

    def published(self, signed: Signed, now: float) -> TaskManifest:
        """A publisher's manifest, whether or not it has expired; its publisher's key must not have."""
        keys = [publisher.key for publisher in self.root.publishers if now < publisher.expires]
        if signed.role is Role.PUBLISHER and any(
            signing.key_id(publisher.key) == signed.key and now >= publisher.expires
            for publisher in self.root.publishers
        ):
            raise RemoteProtocolError(Reason.EXPIRED, f"publisher key {signed.key.hex()} expired")
        return signing.verify(signed, TaskManifest, Role.PUBLISHER, keys)

    def release(self, signed: Signed, manifest_signed: Signed, manifest: TaskManifest) -> Release:
        """A release of `manifest`: number 0 by a publisher, later ones by the manifest's aggregator keys."""
        if signed.role is Role.PUBLISHER:
            release = signing.verify(signed, Release, Role.PUBLISHER, [key.key for key in self.root.publishers])
        else:
            release = signing.verify(signed, Release, Role.AGGREGATOR, aggregator_keys(manifest, Use.RELEASE))
        if (release.number == 0) != (signed.role is Role.PUBLISHER):
            raise RemoteProtocolError(Reason.WRONG_ROLE, f"release {release.number} signed as {signed.role}")
        _belongs(release.task, release.manifest, manifest_signed, manifest)
        return release


def offer(signed: Signed, manifest_signed: Signed, manifest: TaskManifest) -> RoundOffer:
    """An offer of `manifest`'s aggregator, within the bounds that the manifest sets."""
    found = signing.verify(signed, RoundOffer, Role.AGGREGATOR, aggregator_keys(manifest, Use.OFFER))
    _belongs(found.task, found.manifest, manifest_signed, manifest)
    if found.clip > manifest.privacy.clip_max:
        raise RemoteProtocolError(Reason.OFFER_BOUNDS, f"clip {found.clip} above {manifest.privacy.clip_max}")
    if len(found.hpke_key) != KEY_SIZE:
        raise RemoteProtocolError(Reason.OFFER_BOUNDS, f"a key of {len(found.hpke_key)} bytes for {found.suite}")
    if found.round > manifest.plan.rounds:
        raise RemoteProtocolError(Reason.OFFER_BOUNDS, f"round {found.round} of {manifest.plan.rounds}")
    return found


def receipt(signed: Signed, manifest: TaskManifest) -> Receipt:
    """A receipt of `manifest`'s aggregator."""
    found = signing.verify(signed, Receipt, Role.AGGREGATOR, aggregator_keys(manifest, Use.RECEIPT))
    if found.task != manifest.task:
        raise RemoteProtocolError(Reason.WRONG_TASK, f"a receipt for {found.task}")
    return found


def model(message: ReleaseMessage, manifest: TaskManifest, release: Release) -> tuple[Graphs, bytes | None]:
    """The graphs and weights of a release: as signed, and the graphs as the rules for models allow.

    The weights are hashed, not looked into (that takes numpy; see shared.tensors); None: they come in chunks.
    """
    if message.graphs is None:
        raise RemoteProtocolError(Reason.MISSING_PART, f"release {release.number} without its graphs")
    if message.weights is None and not release.weights.chunks:
        raise RemoteProtocolError(Reason.MISSING_PART, f"release {release.number} without its weights")
    if release.weights.size > weights_max(manifest.layout):
        raise RemoteProtocolError(Reason.TOO_LARGE, f"weights of {release.weights.size} bytes for this layout")
    if manifest.opset != OPSET_VERSION:
        raise RemoteProtocolError(Reason.UNSUPPORTED, f"op-set {manifest.opset}, this program knows {OPSET_VERSION}")
    graphs, weights = message.graphs, message.weights
    parts(graphs, weights, manifest, release)
    data = manifest.data
    graph.check(graph.parse(graphs.train), "train", manifest.layout, data.inputs, data.target)
    graph.check(graph.parse(graphs.eval), "eval", manifest.layout, data.inputs, data.target)
    return graphs, weights


def parts(graphs: Graphs, weights: bytes | None, manifest: TaskManifest, release: Release) -> None:
    """Refuse graphs or weights (None: not here) that are not the ones that were signed for."""
    if sha256(graphs.train).digest() != manifest.train_graph or sha256(graphs.eval).digest() != manifest.eval_graph:
        raise RemoteProtocolError(Reason.WRONG_DIGEST, "a graph is not the one that the manifest was signed for")
    if weights is None:
        return
    if len(weights) != release.weights.size or sha256(weights).digest() != release.weights.sha256:
        raise RemoteProtocolError(Reason.WRONG_DIGEST, "the weights are not the ones that the release was signed for")


def aggregator_keys(manifest: TaskManifest, use: Use) -> list[bytes]:
    """The raw keys that the manifest allows `use`."""
    return [key.key for key in manifest.aggregator_keys if use in key.uses]


def continues(newer: RoundOffer, older: RoundOffer) -> None:
    """Refuse a re-issue that does more than raise participation, extend the deadline or leave `open`."""
    same = (older.release, older.clip, older.shards, older.suite, older.hpke_key)
    if (newer.release, newer.clip, newer.shards, newer.suite, newer.hpke_key) != same:
        raise RemoteProtocolError(Reason.OFFER_BOUNDS, "a re-issued offer changed what may not change")
    if newer.participation < older.participation:
        raise RemoteProtocolError(Reason.OFFER_BOUNDS, "a re-issued offer lowered participation")
    if newer.deadline < older.deadline:
        raise RemoteProtocolError(Reason.OFFER_BOUNDS, "a re-issued offer shortened the deadline")
    if newer.state is OfferState.OPEN and older.state is not OfferState.OPEN:
        raise RemoteProtocolError(Reason.OFFER_BOUNDS, "a re-issued offer opened a round again")


@dataclass(frozen=True, slots=True)
class Position:
    """Where a record stands in its task's order: rank is compared lexicographically, digest only for equality."""

    rank: tuple[int, ...]
    digest: bytes


def advance(known: Position | None, found: Position) -> bool:
    """Whether `found` is new; False if it is the one already known. Older or forked raises RemoteProtocolError."""
    if known is None or found.rank > known.rank:
        return True
    if found.rank < known.rank:
        raise RemoteProtocolError(Reason.ROLLBACK, f"{found.rank} after {known.rank}")
    if found.digest != known.digest:
        raise RemoteProtocolError(Reason.EQUIVOCATION, f"two different records at {found.rank}")
    return False


def _belongs(task: str, digest: bytes, manifest_signed: Signed, manifest: TaskManifest) -> None:
    if task != manifest.task:
        raise RemoteProtocolError(Reason.WRONG_TASK, f"{task} under the manifest of {manifest.task}")
    if digest != signing.digest(manifest_signed):
        raise RemoteProtocolError(Reason.WRONG_MANIFEST, f"manifest {digest.hex()[:16]}")
