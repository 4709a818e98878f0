"""What no broker can bring about on demand: messages that meet in one batch of the aggregator's machine."""

import pytest

from aggregator import coordinator as core
from shared.errors import Reason, RemoteProtocolError
from shared.messages import Outcome
from tests.unit.test_coordinator import BODY, RECORDS, Bench, receipts


def test_an_update_that_opens_after_a_new_manifest_does_not_count_in_its_round() -> None:
    """Rounds of two manifests have the same number; an update of the older one must not reach the newer one's fold."""
    bench = Bench()
    bench.begin()
    head = bench.head("a")
    (opened,) = bench.tell(head)
    assert isinstance(opened, core.Open)
    bench.tell(core.ReleaseReceived(RECORDS.message(RECORDS.manifest(version=2))))
    assert bench.offer.round == head.context.round
    assert bench.tell(core.UpdateOpened(head, BODY)) == [core.Recall(head, None)]
    assert bench.outcomes(core.HeadRecalled(head, None)) == [Outcome.SUPERSEDED]


def test_one_update_twice_in_a_batch_is_one_update_and_no_refusal() -> None:
    """Both copies are opened before either counts: one contribution, the same receipt twice."""
    bench = Bench()
    bench.begin()
    head = bench.head("a")
    bench.tell(head, head)
    effects = bench.tell(core.UpdateOpened(head, BODY), core.UpdateOpened(head, BODY))
    assert sum(isinstance(each, core.Contribute) for each in effects) == 1
    assert not any(isinstance(each, core.Refuse) for each in effects)
    assert [each.outcome for each in receipts(effects)] == [Outcome.ACCEPTED] * 2


def test_a_head_that_is_admitted_after_a_new_manifest_is_not_asked() -> None:
    """The key of its round is erased by then: its chunks would be of no use."""
    bench = Bench()
    bench.begin()
    head = bench.head("a", parts=3)
    bench.tell(head, core.ReleaseReceived(RECORDS.message(RECORDS.manifest(version=2))))
    effects = bench.tell(core.HeadAdmitted(head))
    assert effects == [core.Recall(head, None)]


def test_the_last_chunk_of_a_round_that_is_over() -> None:
    """It comes behind the update that closes the round: nothing is opened with a key that is gone."""
    bench = Bench()
    bench.begin()
    slow = bench.head("d", parts=1)
    bench.tell(slow, core.HeadAdmitted(slow))
    for device in "abc":
        bench.update(device)
    with pytest.raises(RemoteProtocolError) as caught:
        bench.chunks(slow, 0)
    assert caught.value.reason is Reason.UNASKED
