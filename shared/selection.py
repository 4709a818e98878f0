"""Who takes part in a round: a hash that device and aggregator both compute, so nobody can volunteer.

A device is selected iff `draw(...) < participation`; 2^32 selects every device.
"""

import hashlib
from collections.abc import Iterable

from shared.messages import PARTICIPATION_ALL


def draw(task: str, manifest_version: int, round_number: int, device: str) -> int:
    """The device's number in this round, uniform in [0, 2^32)."""
    text = f"fieldfare/v1/select\0{task}\0{manifest_version}\0{round_number}\0{device}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def shard(device: str, shards: int) -> int:
    """The shard whose session owns a device's uploads."""
    return int.from_bytes(hashlib.sha256(f"fieldfare/v1/shard\0{device}".encode()).digest()[:4], "big") % shards


def threshold(draws: Iterable[int], want: int) -> int:
    """The participation that admits `want` of these draws; everyone if there are no more than that."""
    ordered = sorted(draws)
    return PARTICIPATION_ALL if len(ordered) <= want else ordered[max(want, 1) - 1] + 1
