"""How releases leave the aggregator: stored with their parts, then put where devices find them.

It never decides what is published; the coordinator does.
"""

from collections.abc import Callable

from aggregator import coordinator as core
from aggregator.coordinator import Task
from aggregator.ports import Blobs, Store
from shared import wire
from shared.errors import LocalProtocolError
from shared.events import Event
from shared.logs import tell
from shared.messages import Graphs, ReleaseMessage
from shared.topics import RELEASE, task_release


class Distribution:
    """`send` publishes (topic, payload, retain) and returns the payload's bytes."""

    def __init__(self, store: Store, blobs: Blobs, send: Callable[[str, bytes, bool], int]) -> None:
        self._store, self._blobs, self._send = store, blobs, send

    def adopt(self, effect: core.AdoptRelease, now: float) -> None:
        """Store a publisher's release with its parts; inside a transaction."""
        message, manifest, release = effect.message, effect.manifest, effect.release
        if message.graphs is None or message.weights is None:
            raise LocalProtocolError("a release was adopted without its parts")
        graphs = (self._blobs.put(message.graphs.train), self._blobs.put(message.graphs.eval))
        weights = self._blobs.put(message.weights)
        self._store.adopt(manifest.task, manifest.version, message, graphs)
        self._store.add_release(manifest.task, manifest.version, release.number, message.release, weights, now)

    def publish(self, task: Task, *, announce: bool) -> None:
        """Put the newest release of a task on its topic, retained; `announce` it to people too."""
        name = task.manifest.task
        train, evaluate, weights = self._store.model(name, task.manifest.version)
        announcement = ReleaseMessage(v=1, manifest=task.manifest_signed, release=task.release_signed)
        whole = ReleaseMessage(
            v=1,
            manifest=task.manifest_signed,
            release=task.release_signed,
            graphs=Graphs(train=self._blobs.get(train), eval=self._blobs.get(evaluate)),
            weights=self._blobs.get(weights),
        )
        size = self._send(task_release(name), wire.pack(whole), True)
        if announce:
            self._send(RELEASE, wire.pack(announcement), False)
        tell(Event.RELEASE_PUBLISHED, task=name, release=task.release.number, bytes=size)
