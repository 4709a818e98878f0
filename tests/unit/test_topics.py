"""Topics: what is written is read back, and nothing else is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import Reason, RemoteProtocolError
from shared.messages import NAME_PATTERN
from shared.topics import Topics, Upload, is_name, parse_task, shard_client, task_release, task_round

TOPICS = Topics("fl")
NAMES = st.from_regex(NAME_PATTERN, fullmatch=True)


@given(NAMES, st.integers(0, 65_535), st.binary(min_size=16, max_size=16))
def test_round_trip(device: str, shard: int, update: bytes) -> None:
    """Every topic that we write parses to what it was made of, below any prefix."""
    for topics in (TOPICS, Topics("site/a")):
        found = topics.parse_upload(topics.head(shard, device, update.hex()))
        assert found == Upload(shard, device, update.hex(), None)
        part = topics.parse_upload(topics.upload_chunk(shard, device, update.hex(), shard))
        assert part == Upload(shard, device, update.hex(), shard)
        assert topics.parse_chunk(topics.chunk((update * 2).hex(), shard)) == (update * 2, shard)
        assert topics.parse_device_status(topics.device_status(device)) == device
        assert topics.parse_aggregator_status(topics.aggregator_status(shard)) == shard
    assert parse_task(task_release(device), "release") == device
    assert parse_task(task_round(device), "round") == device


@pytest.mark.parametrize(
    "topic",
    [
        "fl/up/0/dev-1/0123456789abcdef0123456789abcdef/00",
        "fl/up/0/dev-1/0123456789abcdef0123456789abcdef/-1",
        "fl/up/0/dev-1/0123456789abcdef0123456789abcdef/4294967296",
        "fl/up/0/dev-1/0123456789abcdef0123456789abcde/head",
        "fl/up/0/dev-1/0123456789ABCDEF0123456789ABCDEF/head",
        "fl/up/x/dev-1/0123456789abcdef0123456789abcdef/head",
        "fl/up/-1/dev-1/0123456789abcdef0123456789abcdef/head",
        "fl/up/²/dev-1/0123456789abcdef0123456789abcdef/head",
        "fl/up/999999/dev-1/0123456789abcdef0123456789abcdef/head",
        "fl/up/0/_agg-0/0123456789abcdef0123456789abcdef/head",
        "fl/up/0/dev+1/0123456789abcdef0123456789abcdef/head",
        "fl/up/0/dev-1/0123456789abcdef0123456789abcdef/head/x",
        "fl/up/0/dev-1",
        "other/up/0/dev-1/0123456789abcdef0123456789abcdef/head",
        "",
    ],
)
def test_what_is_no_upload(topic: str) -> None:
    """Anything else is a peer's fault."""
    with pytest.raises(RemoteProtocolError) as caught:
        TOPICS.parse_upload(topic)
    assert caught.value.reason is Reason.TOPIC


@pytest.mark.parametrize("topic", ["fl/dev/x/cmd", "fl/dev/_agg-0/status", "fl/dev//status", "fl/dev/x/y/status"])
def test_what_is_no_status(topic: str) -> None:
    """A status topic names one device."""
    with pytest.raises(RemoteProtocolError):
        TOPICS.parse_device_status(topic)


@pytest.mark.parametrize("topic", ["fl/agg/x/status", "fl/agg/65536/status", "fl/agg/0/will", "fl/agg/00/status"])
def test_what_is_no_aggregator(topic: str) -> None:
    """Its status topic names one shard."""
    with pytest.raises(RemoteProtocolError):
        TOPICS.parse_aggregator_status(topic)


@pytest.mark.parametrize("topic", ["models/release", "models/a/b/release", "models/_a/release", "models/a/round"])
def test_what_is_no_task_release(topic: str) -> None:
    """A task's release topic names one task."""
    with pytest.raises(RemoteProtocolError):
        parse_task(topic, "release")


@given(st.text(max_size=80))
def test_names(text: str) -> None:
    """A name has no level, wildcard, upper case or leading underscore, so no device can be called like a service."""
    if is_name(text):
        assert text.isascii()
        assert not set(text) & set("/+#_ \n")
        assert len(text) <= 63
    assert not is_name(shard_client(0))
    assert not is_name(text + "\n")
