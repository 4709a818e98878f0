"""shared.mqtt over a real broker: what a link says of itself, what it refuses to send, and what comes back to it."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from aggregator.broker import Broker
from shared.driver import Mailbox
from shared.errors import ConfigError, LinkError
from shared.mqtt import Link, LinkBroken, LinkDown, LinkEvent, LinkSettings, LinkUp, Message, Published, Will
from shared.topics import RELEASE, Topics
from tests.broker.broker import HOST, Fleet, Identity, Peer, make_fleet
from tests.hostile.daemon import LEASH, until

K = TypeVar("K", bound=LinkEvent)
TOPICS = Topics()
DEVICE = "link-device"
STATUS = TOPICS.device_status(DEVICE)
RECEIPT = TOPICS.command(DEVICE, "receipt")


class Ear:
    """A link with its mailbox, and every event that was taken from it."""

    def __init__(self, settings: LinkSettings, will: Will | None = None, credits: int = 15) -> None:
        self.mailbox: Mailbox[LinkEvent] = Mailbox(credits)
        self.link = Link(settings, self.mailbox, will)
        self.events: list[LinkEvent] = []
        self._seen = 0

    def next(self, kind: type[K], fits: Callable[[K], bool] = lambda _: True) -> K:
        """The next event of a kind that fits, later than the one before."""

        def found() -> K | None:
            self.events += self.mailbox.take(0.02 if self._seen == len(self.events) else 0.0)
            for number, each in enumerate(self.events[self._seen :], self._seen + 1):
                if isinstance(each, kind) and fits(each):
                    self._seen = number
                    return each
            self._seen = len(self.events)
            return None

        return until(found, f"{kind.__name__}; came: {self.events}")

    def messages(self, count: int) -> list[Message]:
        """The next so many messages."""
        return [self.next(Message) for _ in range(count)]

    def answered(self, mid: int) -> str:
        """The refusal in the broker's answer to what was published."""
        return self.next(Published, lambda each: each.mid == mid).refusal

    def start(self) -> LinkUp:
        """Connect."""
        self.link.start()
        return self.next(LinkUp)


Open = Callable[..., Ear]


@pytest.fixture
def ear(fleet: Fleet, broker: Broker) -> Iterator[Open]:
    """Makes links of the fleet; all of them have ended when the test has."""
    if broker.pid is None:
        broker.start()
    made: list[Ear] = []

    def open_ear(identity: Identity | None = None, *, credits: int = 15, will: Will | None = None, **of: Any) -> Ear:
        made.append(Ear(settings(fleet, identity or fleet.device(DEVICE), **of), will, credits))
        return made[-1]

    yield open_ear
    for each in made:
        each.mailbox.close()
        each.link.stop()
    assert not any(each.link.alive for each in made)


def settings(fleet: Fleet, identity: Identity, **changes: Any) -> LinkSettings:
    """How this identity reaches the fleet's broker; it tries again soon."""
    plain = LinkSettings(
        host=HOST,
        port=fleet.port,
        client_id=DEVICE,
        ca=fleet.authority,
        cert=identity.certificate,
        key=identity.key,
        backoff_min=0.1,
        backoff_max=0.4,
    )
    return replace(plain, **changes)


def durable(fleet: Fleet) -> dict[str, Any]:
    """The aggregator's kind of link."""
    return {"client_id": "_agg-0", "durable": True}


def cut(link: Link) -> None:
    """What a network that fails does to a connection."""
    sock = link._client.socket()
    assert isinstance(sock, socket.socket)
    sock.shutdown(socket.SHUT_RDWR)


# -- up ----------------------------------------------------------------------------------------------------------


def test_up(ear: Open) -> None:
    """A link says that it is up, with the broker's limit, and that its thread lives."""
    one = ear()
    assert (one.link.connected, one.link.alive) == (False, False)
    up = one.start()
    assert up == LinkUp(session_present=False, packet_max=(64 << 20) + (128 << 10))
    assert one.link.packet_max == up.packet_max
    assert (one.link.connected, one.link.alive) == (True, True)
    one.link.stop()
    assert (one.link.connected, one.link.alive) == (False, False)


def test_to_and_fro(ear: Open, fleet: Fleet) -> None:
    """What is published is answered once by its id, and what is subscribed to arrives whole."""
    one = ear()
    one.start()
    one.link.subscribe(RECEIPT)
    mid = one.link.publish(STATUS, b"here")
    assert one.answered(mid) == ""
    with Peer(fleet, fleet.aggregator) as service:
        service.publish(RECEIPT, bytes(range(256)) * 4000)
    (message,) = one.messages(1)
    assert (message.topic, message.payload, message.retain) == (RECEIPT, bytes(range(256)) * 4000, False)


def test_unsubscribed(ear: Open, fleet: Fleet) -> None:
    """Nothing comes on a topic that is asked for no more."""
    one = ear()
    one.start()
    other = TOPICS.command(DEVICE, "other")
    one.link.subscribe(RECEIPT, other)
    with Peer(fleet, fleet.aggregator) as service:
        until(lambda: service.publish(RECEIPT, b"1") == 0 or None, "a subscriber")
        one.messages(1)
        one.link.unsubscribe(RECEIPT)
        assert one.answered(one.link.publish(STATUS, b"after")) == ""
        service.publish(RECEIPT, b"2")
        service.publish(other, b"3")
    assert [each.payload for each in one.messages(1)] == [b"3"]


def test_a_refused_publish(ear: Open) -> None:
    """What the broker's rules forbid is answered with a refusal; where that costs the connection, another is made."""
    one = ear()
    one.start()
    mid = one.link.publish(RELEASE, b"mine")
    assert one.answered(mid) == "Not authorized"
    # mosquitto 2.0.11 closes the connection after such an answer.
    assert one.answered(one.link.publish(STATUS, b"mine")) == ""


def test_bytes_moved(ear: Open, fleet: Fleet) -> None:
    """Both directions are counted as the kernel sees them, over all connections."""
    one = ear()
    assert one.link.bytes_moved() == (0, 0)
    one.start()
    received, sent = one.link.bytes_moved()
    assert received > 0 and sent > 0
    mid = one.link.publish(STATUS, b"x" * 100_000)
    assert one.answered(mid) == ""
    after = one.link.bytes_moved()
    assert 100_000 <= after[1] - sent <= 110_000
    fleet.broker.kill()
    one.next(LinkDown)
    assert one.link.bytes_moved()[1] >= after[1]
    fleet.broker.start()
    one.next(LinkUp)
    again = one.link.bytes_moved()
    assert again[0] > after[0] and after[1] < again[1] < after[1] + 10_000


def test_will(ear: Open, fleet: Fleet) -> None:
    """A link that is cut lets the broker speak for it; one that is stopped does not."""
    with Peer(fleet, fleet.aggregator) as service:
        service.subscribe(TOPICS.device_status("+"))
        service.fence()
        one = ear(will=Will(STATUS, b"gone"))
        one.start()
        one.link.stop()
        assert service.fence() == []
        two = ear(will=Will(STATUS, b"gone"))
        two.start()
        cut(two.link)
        assert until(lambda: service.fence() or None, "the will") == [(STATUS, b"gone")]
    with Peer(fleet, fleet.aggregator) as late:
        late.subscribe(STATUS)
        assert (STATUS, b"gone") in late.fence()  # retained


# -- limits ------------------------------------------------------------------------------------------------------


def test_more_than_the_broker_takes(tmp_path: Path) -> None:
    """A message above the broker's limit is refused before a byte of it is sent, and the error says what to do."""
    fleet = make_fleet(tmp_path)
    config = fleet.folder / "broker" / "mosquitto.conf"
    limit = re.compile("^max_packet_size .*$", re.MULTILINE)
    config.write_text(limit.sub("max_packet_size 200000", config.read_text()))
    with fleet.broker:
        one = Ear(settings(fleet, fleet.device(DEVICE)))
        try:
            up = one.start()
            assert up.packet_max == 200_000
            before = one.link.bytes_moved()
            with pytest.raises(LinkError, match=r"more than the broker takes in one message \(200000\)"):
                one.link.publish(STATUS, bytes(200_000))
            mid = one.link.publish(STATUS, bytes(199_000))
            assert one.answered(mid) == ""
            assert one.link.connected
            assert one.link.bytes_moved()[1] - before[1] < 210_000
        finally:
            one.link.stop()


def test_too_many_wait(ear: Open, fleet: Fleet) -> None:
    """While the broker is away a thousand messages wait and no more; then they are all sent."""
    fleet.broker.kill()
    one = ear()
    one.link.start()
    one.next(LinkDown)
    for number in range(1000):
        one.link.publish(STATUS, b"%d" % number)
    with pytest.raises(LinkError, match="1000 messages wait"):
        one.link.publish(STATUS, b"too many")
    fleet.broker.start()
    assert {one.next(Published).refusal for _ in range(1000)} <= {""}


def test_too_many_bytes_wait(ear: Open, fleet: Fleet) -> None:
    """What waits is bounded in bytes too, by no more than one message beyond; answers make room."""
    fleet.broker.kill()
    one = ear(queue_max=250_000)
    one.link.start()
    one.next(LinkDown)
    for _ in range(3):
        one.link.publish(STATUS, bytes(100_000))
    assert one.link.waiting == 300_000
    with pytest.raises(LinkError, match="300000 bytes wait"):
        one.link.publish(STATUS, b"too much")
    one.link.publish(STATUS, b"not kept, so not counted", qos=0)
    fleet.broker.start()
    assert {one.next(Published).refusal for _ in range(3)} == {""}
    until(lambda: one.link.waiting == 0 or None, "an empty queue")
    assert one.answered(one.link.publish(STATUS, bytes(1_000_000))) == ""  # alone, a large one passes


def test_a_broker_that_takes_less_than_before(tmp_path: Path) -> None:
    """What waits and has become too large is dropped with a refusal; it would cut the link at every try."""
    fleet = make_fleet(tmp_path)
    config = fleet.folder / "broker" / "mosquitto.conf"
    limit = re.compile("^max_packet_size .*$", re.MULTILINE)
    with fleet.broker:
        one = Ear(settings(fleet, fleet.device(DEVICE)))
        try:
            one.start()
            fleet.broker.kill()
            one.next(LinkDown)
            large, small = one.link.publish(STATUS, bytes(300_000)), one.link.publish(STATUS, bytes(100_000))
            config.write_text(limit.sub("max_packet_size 200000", config.read_text()))
            fleet.broker.start()
            assert one.next(LinkUp).packet_max == 200_000 == one.link.packet_max
            assert "more than the broker takes" in one.answered(large)
            assert one.answered(small) == ""
            assert one.link.connected
        finally:
            one.link.stop()


def test_what_was_answered_is_not_sent_again(ear: Open, fleet: Fleet) -> None:
    """A link that comes back in a new session sends what waits once more, and what was answered never."""
    one = ear()
    one.start()
    for number in range(5):
        assert one.answered(one.link.publish(STATUS, b"%d" % number)) == ""
    with Peer(fleet, fleet.aggregator) as service:
        service.subscribe(TOPICS.device_status("+"))
        for _ in range(3):
            cut(one.link)
            one.next(LinkUp)
        assert one.answered(one.link.publish(STATUS, b"new")) == ""
        assert [payload for _, payload in service.fence()] == [b"new"]


def test_nothing_to_ask_for(ear: Open) -> None:
    """No filter is no packet, and no error."""
    one = ear()
    one.start()
    one.link.subscribe()
    one.link.unsubscribe()
    assert one.answered(one.link.publish(STATUS, b"still there")) == ""


def test_large_messages_whole_and_in_order(ear: Open, fleet: Fleet) -> None:
    """Messages of every size around what is read in one piece come whole, in order, and leave the link up."""
    one = ear(credits=2)
    one.start()
    one.link.subscribe(RECEIPT)
    sizes = [1, 16_000, 16_384, 16_400, 122_880, 3_000_000, 0, 50_000]
    with Peer(fleet, fleet.aggregator) as service:
        until(lambda: service.publish(RECEIPT, b"first") == 0 or None, "a subscriber")
        one.messages(1)
        for number, size in enumerate(sizes):
            service.publish(RECEIPT, bytes([number]) * size)
    came = one.messages(len(sizes))
    assert [each.payload for each in came] == [bytes([number]) * size for number, size in enumerate(sizes)]
    assert one.link.connected


def test_larger_than_announced(tmp_path: Path) -> None:
    """A broker that sends more than this link announced is left before memory is taken for it; the cause says why."""
    fleet = make_fleet(tmp_path)
    with fleet.broker:
        one = Ear(settings(fleet, fleet.device(DEVICE), message_max=100_000))
        try:
            one.start()
            one.link._client.packet_limit = 50_000  # so the broker goes on sending what it may
            one.link.subscribe(RECEIPT)
            with Peer(fleet, fleet.aggregator) as service:
                until(lambda: service.publish(RECEIPT, b"first") == 0 or None, "a subscriber")
                one.messages(1)
                service.publish(RECEIPT, bytes(60_000))
            assert re.match(r"a packet of 600\d\d bytes, where 50000 were announced", one.next(LinkDown).cause)
            one.next(LinkUp)
        finally:
            one.mailbox.close()
            one.link.stop()


def test_credits(ear: Open, fleet: Fleet) -> None:
    """Payloads that nobody takes stop at the credits; when they are taken the rest comes, whole and in order."""
    one = ear(credits=3)
    one.start()
    one.link.subscribe(RECEIPT)
    with Peer(fleet, fleet.aggregator) as service:
        until(lambda: service.publish(RECEIPT, b"0") == 0 or None, "a subscriber")
        for number in range(1, 10):
            service.publish(RECEIPT, b"%d" % number)
    until(lambda: one.mailbox._held == 3 or None, "a full mailbox")
    came = one.mailbox.take(0.0)
    assert [each.payload for each in came if isinstance(each, Message)] == [b"0", b"1", b"2"]
    assert [each.payload for each in one.messages(7)] == [b"%d" % number for number in range(3, 10)]
    assert one.answered(one.link.publish(STATUS, b"still")) == ""


# -- acknowledgement ---------------------------------------------------------------------------------------------

CLIENT = """
import sys
from pathlib import Path
from shared.driver import Mailbox
from shared.mqtt import Link, LinkSettings, LinkUp, Message, Published
port, ca, cert, key, count = sys.argv[1:]
mailbox = Mailbox()
link = Link(LinkSettings("localhost", int(port), "_agg-0", Path(ca), Path(cert), Path(key), durable=True), mailbox)
link.start()
left = int(count)
while True:
    for event in mailbox.take(None):
        if isinstance(event, LinkUp):
            link.subscribe("fl/up/0/#")
        if isinstance(event, Message):
            if left:
                link.acknowledge(event)
                left -= 1
                if not left:
                    link.publish("fl/agg/0/status", b"its answer comes after what was acknowledged before")
            print(event.payload.decode(), flush=True)
        if isinstance(event, Published):
            print("settled", flush=True)
"""


def test_what_was_not_acknowledged_comes_back(ear: Open, fleet: Fleet) -> None:
    """kill -9 of a durable client: the broker sends again what was not acknowledged, in order, and nothing else."""
    identity = fleet.aggregator
    arguments = [str(fleet.port), str(fleet.authority), str(identity.certificate), str(identity.key), "4"]
    top = str(Path(__file__).resolve().parents[2])
    with subprocess.Popen(
        [*LEASH, sys.executable, "-c", CLIENT, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=top,
        env=os.environ | {"PYTHONPATH": top},
    ) as child:
        assert child.stdout is not None
        try:
            # A retained status tells for certain that the subscription is there.
            head = TOPICS.head(0, DEVICE, "0" * 32)
            with Peer(fleet, fleet.device(DEVICE)) as device:
                device.publish(head, b"0", retain=True)
                assert child.stdout.readline() == "0\n"
                for number in range(1, 10):
                    device.publish(head, b"%d" % number)
                said = [child.stdout.readline() for _ in range(10)]
                assert "settled\n" in said
                assert [line for line in said if line != "settled\n"] == [f"{number}\n" for number in range(1, 10)]
        finally:
            os.kill(child.pid, signal.SIGKILL)
    with Peer(fleet, fleet.device(DEVICE)) as device:
        device.publish(head, b"", retain=True)
    one = ear(identity, **durable(fleet))
    assert one.start().session_present
    came = [each for each in one.messages(7) if each.payload]
    assert [each.payload for each in came] == [b"%d" % number for number in range(4, 10)]
    for message in one.events:
        if isinstance(message, Message):
            one.link.acknowledge(message)
    one.link.stop()
    two = ear(identity, **durable(fleet))
    assert two.start().session_present
    with Peer(fleet, fleet.device(DEVICE)) as device:
        device.publish(TOPICS.head(0, DEVICE, "0" * 32), b"last")
    assert [each.payload for each in two.messages(1)] == [b"last"]
    two.link.acknowledge(next(each for each in two.events if isinstance(each, Message)))


def test_an_acknowledgement_of_an_earlier_connection(ear: Open, fleet: Fleet) -> None:
    """After a reconnect the broker numbers anew: an old acknowledgement must not settle a new message."""
    one = ear(fleet.aggregator, **durable(fleet))
    one.start()
    one.link.subscribe("fl/up/0/#")
    head = TOPICS.head(0, DEVICE, "1" * 32)
    with Peer(fleet, fleet.device(DEVICE)) as device:
        until(lambda: device.publish(head, b"first") == 0 or None, "a subscriber")  # 16: nobody listens yet
    (first,) = one.messages(1)
    cut(one.link)
    one.next(LinkUp)
    (again,) = one.messages(1)
    assert again.payload == b"first" and again.generation == first.generation + 1
    one.link.acknowledge(first)
    one.link.stop()
    two = ear(fleet.aggregator, **durable(fleet))
    two.start()
    (still,) = two.messages(1)
    assert still.payload == b"first"
    two.link.acknowledge(still)


def test_a_full_mailbox_lets_go(ear: Open, fleet: Fleet) -> None:
    """A network thread that waits for a credit is freed by closing the mailbox, so that a stop does not hang."""
    one = ear(credits=1)
    one.start()
    one.link.subscribe(RECEIPT)
    with Peer(fleet, fleet.aggregator) as service:
        until(lambda: service.publish(RECEIPT, b"1") == 0 or None, "a subscriber")
        service.publish(RECEIPT, b"2")
    until(lambda: one.mailbox._held == 1 or None, "a full mailbox")
    one.mailbox.close()
    stopping = threading.Thread(target=one.link.stop)
    stopping.start()
    stopping.join(20)
    assert not stopping.is_alive()


# -- down --------------------------------------------------------------------------------------------------------


def test_no_broker_yet(ear: Open, fleet: Fleet) -> None:
    """A broker that is not there is one cause, told for every try; when it comes the link is up by itself."""
    fleet.broker.kill()
    one = ear()
    one.link.start()
    down = one.next(LinkDown)
    assert down.cause.startswith(
        f"no connection to {HOST}:{fleet.port}: [Errno 111] Connection refused; nothing listens"
    )
    assert one.next(LinkDown) == down
    assert (one.link.connected, one.link.alive) == (False, True)
    fleet.broker.start()
    assert one.next(LinkUp).session_present is False


def test_broker_killed(ear: Open, fleet: Fleet) -> None:
    """A link that is cut says so and comes back when the broker does; what was published meanwhile is sent then."""
    one = ear()
    one.start()
    for _ in range(2):
        fleet.broker.kill()
        assert one.next(LinkDown).cause == "the connection was cut"
        mid = one.link.publish(STATUS, b"meanwhile", retain=True)
        fleet.broker.start()
        one.next(LinkUp)
        assert one.answered(mid) == ""
    with Peer(fleet, fleet.aggregator) as service:
        service.subscribe(STATUS)
        assert service.fence() == [(STATUS, b"meanwhile")]


def test_what_went_wrong_before(ear: Open, fleet: Fleet) -> None:
    """A link that was up and is cut says that, not why an earlier try failed."""
    fleet.broker.kill()
    one = ear()
    with socket.create_server(("127.0.0.1", fleet.port)) as listener:
        listener.settimeout(20)
        one.link.start()
        listener.accept()[0].close()
        assert "no connection" in one.next(LinkDown).cause
    fleet.broker.start()
    one.next(LinkUp)
    fleet.broker.kill()
    assert one.next(LinkDown).cause == "the connection was cut"


def test_a_fleet_comes_back_spread_out(ear: Open) -> None:
    """Links that were cut at one moment do not all return at another."""
    delays = {ear(backoff_min=1.0, backoff_max=60.0).link._client._reconnect_min_delay for _ in range(20)}
    assert len(delays) == 20
    assert min(delays) >= 0.5 and max(delays) <= 1.5 and max(delays) - min(delays) > 0.3


def test_the_wrong_authority(ear: Open, fleet: Fleet, tmp_path: Path) -> None:
    """A broker whose certificate comes from elsewhere is not believed; the cause says so, and trying goes on."""
    other = make_fleet(tmp_path)
    one = ear(ca=other.authority)
    one.link.start()
    down = one.next(LinkDown)
    assert "certificate verify failed" in down.cause
    assert one.next(LinkDown) == down
    assert not one.link.connected and one.link.alive


def test_the_wrong_name(ear: Open) -> None:
    """A broker under another name than its certificate's is not believed."""
    one = ear(host="127.1")  # the same address, spelt as no certificate does
    one.link.start()
    assert "Hostname mismatch" in one.next(LinkDown).cause


def test_the_wrong_certificate(ear: Open, fleet: Fleet, tmp_path: Path) -> None:
    """A broker that refuses our certificate says why; the tries get rarer, though each handshake seems to succeed."""
    other = make_fleet(tmp_path)
    one = ear(other.device(DEVICE), backoff_min=0.05, backoff_max=60.0)
    one.link.start()
    cause = one.next(LinkDown).cause
    assert "alert unknown ca" in cause and cause.endswith("it is of another fleet")
    # Twice doubled at least, whatever the jitter.
    until(lambda: (one.link._client._reconnect_delay or 0.0) > 0.15 or None, "a longer wait")
    assert not one.link.connected and one.link.alive


def test_a_clock_of_its_own(ear: Open) -> None:
    """With a clock that is ahead of the broker's certificate there is no link; put right, it comes up by itself."""
    offset = [50 * 366 * 86_400]
    one = ear(clock=lambda: time.time() + offset[0])
    one.link.start()
    assert "certificate has expired; the broker's certificate has, or" in one.next(LinkDown).cause
    assert not one.link.connected
    offset[0] = 0
    one.next(LinkUp)


def test_a_clock_that_stands_in_1970(ear: Open) -> None:
    """A certificate that begins later proves that the clock is behind, and is taken."""
    ear(clock=lambda: 0.0).start()


def test_a_system_clock_that_is_wrong(tmp_path: Path) -> None:
    """A board whose clock is years off still connects when it knows better, and the chain is verified all the same."""
    fleet, other = make_fleet(tmp_path / "old", days_old=1200), make_fleet(tmp_path / "other", days_old=1200)
    then = time.time() - 1000 * 86_400
    with fleet.broker:
        for trusted, clock, cause in (
            (fleet, None, "certificate has expired"),
            (other, lambda: then, "certificate verify failed"),
            (fleet, lambda: then, ""),
        ):
            one = Ear(replace(settings(fleet, fleet.device(DEVICE)), ca=trusted.authority, clock=clock))
            try:
                one.link.start()
                if cause:
                    assert cause in one.next(LinkDown).cause
                else:
                    one.next(LinkUp)
            finally:
                one.link.stop()


def test_taken_over(ear: Open, fleet: Fleet) -> None:
    """Another client with our identity ends our link, which then takes the session back."""
    one = ear()
    one.start()
    with Peer(fleet, fleet.device(DEVICE)) as other:
        one.next(LinkDown)
        one.next(LinkUp)
        assert not other.is_up()


def test_files_that_do_not_fit(fleet: Fleet, tmp_path: Path) -> None:
    """A missing, wrong or foreign file is a mistake of the configuration that names the key."""
    good = settings(fleet, fleet.device(DEVICE))
    text = tmp_path / "text"
    text.write_text("no PEM")
    box: Mailbox[LinkEvent] = Mailbox()
    changes: list[tuple[dict[str, Any], str]] = [
        ({"ca": tmp_path / "absent"}, "broker.ca"),
        ({"ca": text}, "broker.ca"),
        ({"cert": text}, "broker.cert"),
        ({"key": fleet.operator.key}, "broker.cert"),
        ({"key": tmp_path / "absent"}, "broker.key"),
    ]
    for change, key in changes:
        with pytest.raises(ConfigError) as caught:
            Link(replace(good, **change), box)
        assert caught.value.key == key


def test_a_callback_that_fails(ear: Open, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own mistake in the network thread is told at once: the owner ends the process, nobody waits for nothing."""
    one = ear()
    one.start()
    one.link.subscribe(RECEIPT)

    def broken(event: LinkEvent, size: int) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(one.mailbox, "post_payload", broken)
    with Peer(fleet, fleet.aggregator) as service:
        until(lambda: service.publish(RECEIPT, b"1") == 0 or None, "a subscriber")
    assert one.next(LinkBroken).cause == "_on_message: KeyError: 'oops'"
    assert one.link.alive


def test_an_idle_link_sleeps(ear: Open) -> None:
    """Its thread wakes for a ping and for the answer, which is some wake-ups in a keep-alive, and the link stays up."""
    one = ear(keepalive=5)
    one.start()
    (thread,) = [each for each in threading.enumerate() if each.name == f"paho-mqtt-client-{DEVICE}"]

    def woken() -> int:
        text = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
        return int(re.search(r"^voluntary_ctxt_switches:\s+(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]

    before, end = woken(), time.monotonic() + 16
    until(lambda: time.monotonic() > end or None, "three keep-alives pass", seconds=30)
    assert woken() - before <= 10
    assert one.link.connected
    assert not any(isinstance(each, LinkDown) for each in one.mailbox.take(0.0))
