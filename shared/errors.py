"""Every error Fieldfare raises, in one tree.

`RemoteProtocolError` is a peer's fault: the message is dropped and counted, never fatal.
`LocalProtocolError` is our own bug: the daemon stops and systemd restarts it.
`ConfigError` is the operator's to mend: the process exits with 78 and says which file, which key and what to do.
A call that raises any of these has changed nothing.
"""

import errno
from enum import StrEnum
from typing import Self


class Reason(StrEnum):
    """Why a peer's bytes were refused; also the metric label, so a value is never renamed."""

    # the envelope
    NOT_MSGPACK = "not_msgpack"
    NOT_CANONICAL = "not_canonical"
    WRONG_TYPE = "wrong_type"
    TOO_LARGE = "too_large"
    EMPTY = "empty"
    VERSION = "version"
    TOPIC = "topic"
    # signed records
    BAD_SIGNATURE = "bad_signature"
    UNKNOWN_KEY = "unknown_key"
    WRONG_ROLE = "wrong_role"
    EXPIRED = "expired"
    ROLLBACK = "rollback"
    EQUIVOCATION = "equivocation"
    WRONG_TASK = "wrong_task"
    WRONG_MANIFEST = "wrong_manifest"
    WRONG_DIGEST = "wrong_digest"
    UNSUPPORTED = "unsupported"
    OFFER_BOUNDS = "offer_bounds"
    MISSING_PART = "missing_part"
    # the model
    GRAPH_INVALID = "graph_invalid"
    GRAPH_OP = "graph_op"
    GRAPH_ARGUMENT = "graph_argument"
    GRAPH_REFERENCE = "graph_reference"
    GRAPH_TOO_LARGE = "graph_too_large"
    GRAPH_LAYOUT = "graph_layout"
    WEIGHTS_INVALID = "weights_invalid"
    NOT_FINITE = "not_finite"
    WRONG_DIMENSION = "wrong_dimension"
    # identity
    BAD_CERTIFICATE = "bad_certificate"
    WRONG_DEVICE = "wrong_device"
    DENIED = "denied"
    # updates
    SEALED_BADLY = "sealed_badly"
    NORM = "norm"
    METRICS = "metrics"
    NO_SUCH_ROUND = "no_such_round"
    NOT_SELECTED = "not_selected"
    LATE = "late"
    DUPLICATE = "duplicate"
    # chunks
    UNASKED = "unasked"
    BAD_CHUNK = "bad_chunk"
    EVICTED = "evicted"
    QUARANTINED = "quarantined"


class Refused(StrEnum):
    """Why a registrar refuses a device, or a device the registrar; it crosses the wire, so a value is never renamed."""

    BAD_REQUEST = "bad_request"
    TOO_LARGE = "too_large"
    NOT_FOUND = "not_found"
    TOO_MANY = "too_many"
    """For now: the same request may succeed later, as with UNAVAILABLE."""
    UNAVAILABLE = "unavailable"
    BAD_TOKEN = "bad_token"
    """An unknown one or a wrong secret; the answer does not tell which."""
    TOKEN_EXPIRED = "token_expired"
    TOKEN_REVOKED = "token_revoked"
    TOKEN_USED = "token_used"
    NAME_NEEDED = "name_needed"
    BAD_NAME = "bad_name"
    WRONG_NAME = "wrong_name"
    """Another than the token or the certificate is for."""
    NAME_TAKEN = "name_taken"
    BAD_CSR = "bad_csr"
    BAD_CERTIFICATE = "bad_certificate"
    BAD_SIGNATURE = "bad_signature"
    TOO_LATE = "too_late"
    """The certificate expired so long ago that only a new token helps."""
    DENIED = "denied"
    REVOKED = "revoked"
    WRONG_PIN = "wrong_pin"
    """Only a device says it: the registrar is not the token's."""


class FieldfareError(Exception):
    """The root of the tree; never raised itself."""


class RemoteProtocolError(FieldfareError):
    """A peer sent something that the protocol does not allow: drop it, count `reason`, go on."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)
        self.reason = reason
        self.detail = detail


class LocalProtocolError(FieldfareError):
    """This program broke its own rules: stop, so that the service manager restarts it from what is on disk."""


class ConfigError(FieldfareError):
    """A setting is wrong. `path` is the file, `key` the dotted key in it (may be empty), `advice` what to do."""

    def __init__(self, path: str, key: str, advice: str) -> None:
        super().__init__(f"{path}: {key}: {advice}" if key else f"{path}: {advice}")
        self.path = path
        self.key = key
        self.advice = advice


class ExportError(FieldfareError):
    """A publisher's model, loss or task file cannot become a release; the text says what, where and the remedy."""


class StorageError(FieldfareError):
    """The disk or the database refused; nothing has changed, and the same call may be made again.

    `passing`: it may work later (a full disk, an input/output error), else somebody has to mend something first.
    """

    def __init__(self, path: str, detail: str, *, passing: bool) -> None:
        super().__init__(f"{path}: {detail}")
        self.path = path
        self.detail = detail
        self.passing = passing

    @classmethod
    def of(cls, path: object, error: OSError) -> Self:
        """What the operating system said about `path`."""
        passing = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS)
        return cls(str(path), error.strerror or str(error), passing=passing)


class TrainingError(FieldfareError):
    """Training on this device failed in a way worth a typed word; `reason` is one of the wire's obstacle names."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class EnrolmentError(FieldfareError):
    """A registrar or a device refuses the other's word: nothing has changed; `reason` is the typed one."""

    def __init__(self, reason: Refused, detail: str = "") -> None:
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)
        self.reason = reason
        self.detail = detail


class LinkError(FieldfareError):
    """The broker cannot be reached or refuses this client; the text says which and what to check."""
