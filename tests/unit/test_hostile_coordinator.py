"""What no broker can bring about on demand: messages that meet in one batch of the aggregator's machine."""

from aggregator import coordinator as core
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
    effects = bench.tell(core.UpdateOpened(head, BODY))
    assert not any(isinstance(each, core.Contribute) for each in effects)
    assert [each.outcome for each in receipts(effects)] == [Outcome.SUPERSEDED]


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
