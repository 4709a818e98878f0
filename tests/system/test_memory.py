"""What the aggregator needs of memory does not grow with the updates of a round. Without a broker."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from aggregator import ca
from shared import wire
from shared.chunks import CHUNK_SIZE
from shared.messages import Missing, Plan
from shared.mqtt import Message
from shared.topics import update_name
from tests.forgery import forge
from tests.hostile import records
from tests.hostile.records import Device
from tests.unit.test_aggregator_service import Bench

T = TypeVar("T")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A service in a folder."""
    return Bench(tmp_path)


def test_memory_is_flat(bench: Bench) -> None:
    """Of a thousand updates of 128 KiB that come at once, no more than the limits allow is in memory at any time."""
    width, count, size = 10_880, 1_000, 4 << 20
    bench.limit(update_bytes=size, device_update_bytes=1 << 20)
    bench.adopt(2, records.wide(width), plan=Plan(2 * count, 1, 9, 3600), **records.of_width(width))
    authority, key = ca.open_authority(bench.folder / "fleet", None), ec.generate_private_key(ec.SECP256R1())
    delta, offer, heads = records.values(3 * width, 1e-4), bench.offer, list[Message]()
    for number in range(count):
        device = Device(f"unit-{number}", forge(authority, f"unit-{number}", key=key).der, key)
        update = records.update(device, offer, delta=delta, context={"dimension": 3 * width}, chunk=CHUNK_SIZE)
        # On the disk, so that what is measured is what the service holds.
        (bench.folder / update.name).write_bytes(update.body or b"")
        heads.append(bench.sent(update, device))
    held = [resident()]
    for batch in batches(heads):
        bench.batch(*batch)
    while waiting := [(topic, payload) for topic, payload in bench.publications if topic.endswith("/missing")]:
        bench.publications.clear()
        asked = [(topic.split("/")[2], wire.unpack(payload, Missing)) for topic, payload in waiting]
        wanted = [(name, update_name(each.head), index) for name, each in asked for index in each.chunks]
        for numbers in batches(wanted):
            bench.batch(*(chunk(bench, *each) for each in numbers))
            held.append(resident())
    assert (bench.updates, bench.service._refused) == (count, {})
    assert max(held) - held[0] < 4 * size
    assert max(held[len(held) // 2 :]) - max(held[: len(held) // 2]) < size


def chunk(bench: Bench, device: str, update: str, index: int) -> Message:
    """What a device sends when it is asked."""
    with (bench.folder / update).open("rb") as file:
        file.seek(index * CHUNK_SIZE)
        return bench.message(bench.topics.upload_chunk(0, device, update, index), file.read(CHUNK_SIZE))


def batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """As many as the mailbox gives credit for."""
    return (items[start : start + 15] for start in range(0, len(items), 15))


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
