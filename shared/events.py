"""Every event worth telling, by its name: the log event and the metric are called the same.

docs/events.md lists them for people and a test compares. Names are never renamed and never reused. Pure.
"""

import hashlib
from collections.abc import Mapping
from enum import StrEnum


class Event(StrEnum):
    """`noun.past_participle`; `level_of` says how loud, `message_id_of` the journal's MESSAGE_ID."""

    # both daemons
    DAEMON_STARTED = "daemon.started"
    DAEMON_STOPPED = "daemon.stopped"
    LINK_UP = "link.up"
    LINK_DOWN = "link.down"
    MESSAGE_REFUSED = "message.refused"
    CLOCK_JUMPED = "clock.jumped"
    LIBRARY_SAID = "library.said"
    STORAGE_FAILED = "storage.failed"
    STORAGE_RECOVERED = "storage.recovered"
    CERTIFICATE_EXPIRING = "certificate.expiring"
    CERTIFICATE_RENEWED = "certificate.renewed"
    RENEWAL_FAILED = "renewal.failed"
    # the device
    RELEASE_ACCEPTED = "release.accepted"
    DOWNLOAD_STARTED = "download.started"
    DOWNLOAD_STOPPED = "download.stopped"
    DATA_MISSED = "data.missed"
    DEVICE_ELIGIBLE = "device.eligible"
    DEVICE_BLOCKED = "device.blocked"
    DEVICE_PAUSED = "device.paused"
    DEVICE_RESUMED = "device.resumed"
    TRAINER_STARTED = "trainer.started"
    TRAINER_STOPPED = "trainer.stopped"
    TRAINER_DIED = "trainer.died"
    TRAINER_SAID = "trainer.said"
    TRAINING_STARTED = "training.started"
    TRAINING_PROGRESSED = "training.progressed"
    TRAINING_FROZEN = "training.frozen"
    TRAINING_THAWED = "training.thawed"
    TRAINING_LEAVING = "training.leaving"
    TRAINING_LEFT = "training.left"
    TRAINING_FINISHED = "training.finished"
    TRAINING_STOPPED = "training.stopped"
    TRAINING_FAILED = "training.failed"
    MODEL_USED = "model.used"
    MODEL_REFUSED = "model.refused"
    UPDATE_SENT = "update.sent"
    UPDATE_ANSWERED = "update.answered"
    UPDATE_DROPPED = "update.dropped"
    # the aggregator
    TASK_ADOPTED = "task.adopted"
    ROUND_OPENED = "round.opened"
    ROUND_WIDENED = "round.widened"
    ROUND_EXTENDED = "round.extended"
    ROUND_CLOSED = "round.closed"
    ROUND_ABANDONED = "round.abandoned"
    FOLD_REBUILT = "fold.rebuilt"
    PUBLISH_REFUSED = "publish.refused"
    PUBLISH_DELAYED = "publish.delayed"
    RELEASE_MISSED = "release.missed"
    RELEASE_DAMAGED = "release.damaged"
    RELEASE_RESTORED = "release.restored"
    RELEASE_WITHDRAWN = "release.withdrawn"
    ROOT_ADOPTED = "root.adopted"
    TASK_RECOVERED = "task.recovered"
    TASK_PAUSED = "task.paused"
    TASK_RESUMED = "task.resumed"
    TASK_STOPPED = "task.stopped"
    UPDATE_ACCEPTED = "update.accepted"
    UPDATE_REJECTED = "update.rejected"
    UPDATE_EVICTED = "update.evicted"
    MESSAGE_QUARANTINED = "message.quarantined"
    RELEASE_PUBLISHED = "release.published"
    TASK_FINISHED = "task.finished"
    # the registrar
    DEVICE_ENROLLED = "device.enrolled"
    DEVICE_RENEWED = "device.renewed"
    DEVICE_REVOKED = "device.revoked"
    ENROLMENT_REFUSED = "enrolment.refused"
    TOKEN_CREATED = "token.created"
    TOKEN_REVOKED = "token.revoked"


_LEVELS: Mapping[Event, str] = {
    Event.LINK_DOWN: "warning",
    Event.MESSAGE_REFUSED: "warning",
    Event.CLOCK_JUMPED: "warning",
    Event.STORAGE_FAILED: "error",
    Event.CERTIFICATE_EXPIRING: "warning",
    Event.RENEWAL_FAILED: "warning",
    Event.DOWNLOAD_STOPPED: "warning",
    Event.DATA_MISSED: "warning",
    Event.TRAINER_DIED: "warning",
    Event.TRAINING_FAILED: "error",
    Event.MODEL_REFUSED: "warning",
    Event.UPDATE_DROPPED: "warning",
    Event.ROUND_EXTENDED: "warning",
    Event.UPDATE_REJECTED: "warning",
    Event.MESSAGE_QUARANTINED: "error",
    Event.ROUND_ABANDONED: "warning",
    Event.PUBLISH_REFUSED: "error",
    Event.PUBLISH_DELAYED: "warning",
    Event.RELEASE_MISSED: "warning",
    Event.RELEASE_DAMAGED: "error",
    Event.TASK_RECOVERED: "warning",
    Event.DEVICE_REVOKED: "warning",
    Event.ENROLMENT_REFUSED: "warning",
}


def level_of(event: Event) -> str:
    """debug, info, warning or error."""
    return _LEVELS.get(event, "info")


def message_id_of(event: Event) -> str:
    """The 32 hex digits under which the journal finds every record of this event: they follow from its name."""
    return hashlib.sha256(b"fieldfare/event/" + event.value.encode()).hexdigest()[:32]
