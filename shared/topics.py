"""Every topic in one place: how it is written and how it is read back.

A topic that does not parse is a peer's fault. The prefix is configurable; `models/` is the human interface and is not.
"""

import re
from dataclasses import dataclass
from typing import Literal

from shared.errors import Reason, RemoteProtocolError
from shared.messages import NAME_PATTERN

RELEASE = "models/release"
"""Where a person or CI puts a model into the fleet."""

SERVICE_OPERATOR = "_operator"

_NAME = re.compile(NAME_PATTERN)
_HEAD = re.compile(r"[0-9a-f]{32}")
_BLOB = re.compile(r"[0-9a-f]{64}")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


def is_name(text: str) -> bool:
    """Whether `text` can name a device or a task."""
    return _NAME.fullmatch(text) is not None


def shard_client(shard: int) -> str:
    """The certificate name and client id of the aggregator that owns `shard`'s uploads."""
    return f"_agg-{shard}"


def task_release(task: str) -> str:
    """The newest verified release of a task, retained."""
    return f"models/{task}/release"


def task_round(task: str) -> str:
    """The newest offer of a task, retained."""
    return f"models/{task}/round"


def update_name(head: bytes) -> str:
    """What topics call an update whose signed head has this sha256."""
    return head.hex()[:32]


TASK_RELEASES = task_release("+")
TASK_ROUNDS = task_round("+")


@dataclass(frozen=True, slots=True)
class Upload:
    """Where an update arrives: `fl/up/<shard>/<device>/<update>/<part>`."""

    shard: int
    device: str
    update: str
    chunk: int | None
    """The number of a chunk; None for the head."""


@dataclass(frozen=True, slots=True)
class Topics:
    """The topics below the prefix."""

    prefix: str = "fl"

    def head(self, shard: int, device: str, update: str) -> str:
        """Where a device sends a head; `update` is its `update_name`."""
        return f"{self.prefix}/up/{shard}/{device}/{update}/head"

    def upload_chunk(self, shard: int, device: str, update: str, index: int) -> str:
        """Where a device sends a chunk that it was asked for; `update` as in `head`."""
        return f"{self.prefix}/up/{shard}/{device}/{update}/{index}"

    def uploads(self, shard: int) -> str:
        """The filter for all that one shard's devices send."""
        return f"{self.prefix}/up/{shard}/#"

    def chunk(self, blob: str, index: int) -> str:
        """One chunk of a blob, retained; `blob` is the hex sha256 of the whole."""
        return f"{self.prefix}/blob/{blob}/{index}"

    def root(self, version: int | Literal["+"]) -> str:
        """A root record, retained."""
        return f"{self.prefix}/root/{version}"

    def device_status(self, device: str) -> str:
        """Presence of one device, retained."""
        return f"{self.prefix}/dev/{device}/status"

    def command(self, device: str, kind: str) -> str:
        """What the aggregator tells one device."""
        return f"{self.prefix}/dev/{device}/cmd/{kind}"

    def aggregator_status(self, shard: int | Literal["+"]) -> str:
        """Presence of the aggregator of one shard, retained."""
        return f"{self.prefix}/agg/{shard}/status"

    def parse_upload(self, topic: str) -> Upload:
        """Read an upload's topic back."""
        parts = self._below(topic, "up", 4)
        shard, device, update, part = parts
        if not shard.isascii() or not shard.isdigit() or len(shard) > 5 or not _HEAD.fullmatch(update):
            raise _bad(topic)
        if not is_name(device) or not (part == "head" or _NUMBER.fullmatch(part)):
            raise _bad(topic)
        return Upload(int(shard), device, update, None if part == "head" else int(part))

    def parse_root(self, topic: str) -> int:
        """The version of the root record that a topic carries."""
        (version,) = self._below(topic, "root", 1)
        if not _NUMBER.fullmatch(version):
            raise _bad(topic)
        return int(version)

    def parse_chunk(self, topic: str) -> tuple[bytes, int]:
        """The sha256 of a blob and the number of the chunk that a topic carries."""
        blob, index = self._below(topic, "blob", 2)
        if not _BLOB.fullmatch(blob) or not _NUMBER.fullmatch(index):
            raise _bad(topic)
        return bytes.fromhex(blob), int(index)

    def parse_device_status(self, topic: str) -> str:
        """The device that a status topic speaks of."""
        device, word = self._below(topic, "dev", 2)
        if word != "status" or not is_name(device):
            raise _bad(topic)
        return device

    def parse_aggregator_status(self, topic: str) -> int:
        """The shard whose aggregator a status topic speaks of."""
        number, word = self._below(topic, "agg", 2)
        if word != "status" or not _NUMBER.fullmatch(number) or int(number) > 65_535:
            raise _bad(topic)
        return int(number)

    def _below(self, topic: str, branch: str, count: int) -> list[str]:
        start = f"{self.prefix}/{branch}/"
        parts = topic.removeprefix(start).split("/")
        if not topic.startswith(start) or len(parts) != count:
            raise _bad(topic)
        return parts


def parse_task(topic: str, word: str) -> str:
    """The task of `models/<task>/<word>`."""
    parts = topic.split("/")
    if len(parts) != 3 or parts[0] != "models" or parts[2] != word or not is_name(parts[1]):
        raise _bad(topic)
    return parts[1]


def _bad(topic: str) -> RemoteProtocolError:
    return RemoteProtocolError(Reason.TOPIC, f"no such topic: {topic!r:.120}")
