"""An update that kills the aggregator whenever it is opened: quarantined, and everybody else counts once."""

import json
import signal
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from aggregator.broker import Broker
from shared import wire
from shared.chunks import CHUNK_MIN
from shared.messages import Missing, Outcome, Receipt
from tests.broker import deadly
from tests.broker.broker import Peer
from tests.broker.test_aggregator import NAMES, UNIFORM, Yard, cells, plan, post, yard
from tests.hostile import records
from tests.hostile.daemon import LEASH, until
from tests.hostile.records import DIMENSION, Update

__all__ = ["yard"]
POISONER = 3


@pytest.fixture
def doomed(yard: Yard, broker: Broker) -> Iterator[Yard]:
    """A yard whose aggregator dies of the mark from its next start on."""
    yard.daemon._command = [*LEASH, sys.executable, deadly.__file__, "run", "--config", str(yard.config)]
    yield yard


def poison(fleet: Yard, **changes: object) -> Update:
    """The deadly update of one of the devices."""
    delta = np.zeros(DIMENSION, "<f4")
    delta[0] = deadly.MARK
    return records.update(fleet.devices[POISONER], fleet.offer("main"), delta=delta.tobytes(), **changes)  # type: ignore[arg-type]


def dies(fleet: Yard) -> None:
    """The aggregator, started or running, ends by the signal of the fault, as systemd would see it."""
    assert fleet.daemon._child is not None
    assert fleet.daemon._child.wait(30) == -signal.SIGKILL


def quarantined(fleet: Yard) -> list[str]:
    """The topics of what lies in the folder."""
    found = sorted((fleet.state / "quarantine").iterdir())
    return [json.loads(path.read_bytes().partition(b"\n")[0])["topic"] for path in found]


def test_a_message_that_kills(doomed: Yard) -> None:
    """One of eight that wait together: it dies with all, twice alone, and then the seven others are a release."""
    doomed.task("main", plan=plan(7), algorithm=UNIFORM)
    bad = poison(doomed)
    good = [doomed.unit(each, doomed.offer("main")) for each in range(8) if each != POISONER]
    doomed.kill()
    post(doomed, [*good[:4], bad, *good[4:]])
    for _ in range(3):
        doomed.daemon.start()
        dies(doomed)
    since = doomed.start()
    told = doomed.daemon.wait("message.quarantined", since)
    assert told["level"] == "error" and NAMES[POISONER] in told["topic"]
    doomed.released(1)
    others = [each for each in range(8) if each != POISONER]
    assert doomed.model() == cells(*others, value=float(np.float32(1) / np.float32(7)))
    assert doomed.rows("SELECT COUNT(*), COUNT(DISTINCT device) FROM contributions") == [(7, 7)]
    assert quarantined(doomed) == [f"fl/up/0/{NAMES[POISONER]}/{bad.name}/head"]

    def shown() -> bool | None:
        status = json.loads((doomed.state / "status.json").read_text())
        return True if (status["quarantined"], status["refused"].get("quarantined")) == (1, 1) else None

    until(shown, "a status that counts it")
    # Its device knows nothing and sends it again: it is refused at the door, also after a restart.
    for _ in range(2):
        since = len(doomed.daemon.read())
        post(doomed, [bad])
        doomed.daemon.wait("message.refused", since, reason="quarantined")
        doomed.kill()
        doomed.start()


def test_an_update_in_chunks_that_kills(doomed: Yard) -> None:
    """Its chunks are lost with each death and pulled again; in the end its device is told that it does not count."""
    doomed.task("main", plan=plan(2), algorithm=UNIFORM)
    bad = poison(doomed, chunk=CHUNK_MIN)
    doomed.kill()
    name = NAMES[POISONER]
    answers: list[Receipt] = []
    doomed.start()
    with Peer(doomed.fleet, doomed.fleet.device(name)) as peer:
        peer.subscribe(f"fl/dev/{name}/cmd/+")
        deaths = 0
        while not answers:
            # As a device does it: the head, until there is an answer; and the chunks that are asked for.
            peer.publish(f"fl/up/0/{name}/{bad.name}/head", bad.payload)
            found = until(lambda: peer.fence() or None, "an answer")
            for topic, data in found:
                if topic.endswith("receipt"):
                    answers.append(doomed.opened(data))
                    continue
                for index in wire.unpack(data, Missing).chunks:
                    peer.publish(f"fl/up/0/{name}/{bad.name}/{index}", bad.pieces[index])
            if not answers:
                try:
                    until(lambda: doomed.daemon._child.poll() if doomed.daemon._child else None, "its death", 3.0)
                except AssertionError:
                    continue
                deaths += 1
                doomed.start()
    assert deaths == 3
    assert {(each.outcome, each.reason) for each in answers} == {(Outcome.REJECTED, "quarantined")}
    assert quarantined(doomed) == [f"fl/up/0/{name}/{bad.name}/0"]
    doomed.give(0, 1)
    doomed.released(1)
    assert doomed.model() == cells(0, 1, value=0.5)
    assert doomed.outcome(doomed.devices[POISONER], bad) is Outcome.REJECTED
