"""The broker is read back on every connection: what is lost is put back, what is newer adopted, numbers left out."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from aggregator import coordinator as core
from aggregator.readback import PATIENCE, Standing, skipped, standing
from shared import signing, trust, wire
from shared.errors import Reason, RemoteProtocolError
from shared.machine import Instant
from shared.messages import BlobRef, OfferState, Outcome, ReleaseMessage, Role, RootMessage, RoundOffer
from shared.trust import Position
from tests.records import NOW, Records, key, weights
from tests.unit.test_coordinator import RECORDS, UP, Bench, ends, only, receipts, run_round, status

FIRST, ROOT, LAST = UP


def test_standing() -> None:
    """Absent or older, the same, newer, or another one in the same place."""
    ours = Position((1, 4), b"a")
    assert standing(ours, None) is Standing.BEHIND
    assert standing(ours, Position((1, 3), b"z")) is Standing.BEHIND
    assert standing(ours, ours) is Standing.SAME
    assert standing(ours, Position((1, 5), b"a")) is Standing.AHEAD
    assert standing(ours, Position((1, 4), b"b")) is Standing.FORKED
    assert standing(None, ours) is Standing.AHEAD


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_round_numbers_are_left_out_within_the_plan(last: int, rounds: int) -> None:
    """By a thousand or half of what is left, at least one; none is left to leave out at the end."""
    number = skipped(last, rounds)
    if last >= rounds:
        assert number == last
    else:
        assert last < number <= min(rounds, last + 1000)
        assert number - last <= max(1, (rounds - last) // 2)


def retained(bench: Bench) -> list[core.Event]:
    """What the broker has when it has everything."""
    task = bench.machine.tasks["points"]
    message = RECORDS.message()
    whole = structs.replace(message, manifest=task.manifest_signed, release=task.release_signed)
    found: list[core.Event] = [core.ReleaseFound("points", whole)]
    return found + ([core.OfferFound("points", task.offer_signed)] if task.offer_signed is not None else [])


def kinds(effects: list[core.Effect]) -> list[type[core.Effect]]:
    """What is done."""
    return [type(each) for each in effects]


def test_nothing_is_said_again_that_is_there() -> None:
    """A short cut of the link repeats nothing to the fleet."""
    bench = Bench()
    bench.begin()
    assert bench.tell(FIRST, ROOT, *retained(bench), LAST) == []


def test_what_is_absent_is_put_back() -> None:
    """A broker that lost everything gets root, release and offer again."""
    bench = Bench()
    bench.begin()
    assert kinds(bench.tell(FIRST, LAST)) == [core.PublishRoot, core.PublishRelease, core.PublishOffer]


def test_what_is_older_is_put_right() -> None:
    """A broker that was killed hard brings back what it had saved some minutes ago."""
    bench = Bench()
    bench.begin()
    before = retained(bench)
    run_round(bench, {})
    effects = bench.tell(FIRST, ROOT, *before, LAST)
    assert kinds(effects) == [core.PublishRelease, core.PublishOffer]
    assert isinstance(effects[1], core.PublishOffer)
    assert effects[1].signed == bench.machine.tasks["points"].offer_signed


def test_patience_ends() -> None:
    """A broker that never sends our status back holds nothing up for long; before that nothing is decided."""
    bench = Bench()
    bench.tell(core.ReleaseReceived(RECORDS.message()), *(core.StatusReceived(each, status()) for each in "abc"))
    assert bench.machine.deadline is None
    bench.tell(FIRST)
    assert bench.machine.deadline == NOW.mono + PATIENCE
    assert bench.after(PATIENCE - 1) == []
    assert only(bench.after(1), core.OpenRound)
    assert bench.tell(LAST) == []


def test_deadlines_wait_for_the_broker() -> None:
    """A restored aggregator must not close a round of which the broker knows better."""
    bench = Bench()
    bench.begin()
    bench.machine.ready = False
    assert bench.machine.deadline is None
    assert bench.after(1000) == []


def test_what_is_queued_for_a_lost_key_is_answered() -> None:
    """An old copy of the state has no keys: updates that the broker kept for its round must not end the daemon."""
    bench = Bench()
    bench.begin()
    bench.machine.ready, bench.machine.tasks["points"].keyless = False, True
    effects = bench.tell(bench.head("a"))
    assert [(each.outcome, each.reason) for each in receipts(effects)] == [(Outcome.SUPERSEDED, "no_such_round")]
    assert only(effects, core.Admit) == []


def test_a_round_that_is_full_waits_for_the_broker() -> None:
    """What was queued while we were away counts at once; what follows from it is decided once we know where we are."""
    bench = Bench()
    bench.begin()
    bench.machine.ready = False
    bench.tell(FIRST)
    for device in "abc":
        effects = bench.update(device)
        assert only(effects, core.Contribute) and not only(effects, core.Reduce)
    effects = bench.tell(ROOT, *retained(bench), LAST)
    assert kinds(effects) == [core.ReviseRound, core.Reduce]


def test_junk_is_refused() -> None:
    """Forged, foreign or incomplete records on our own topics are dropped, and ours put back."""
    bench = Bench()
    bench.begin()
    good = RECORDS.message(number=7)
    signed = good.release
    cases: list[tuple[ReleaseMessage, Reason]] = [
        (structs.replace(good, release=structs.replace(signed, sig=bytes(64))), Reason.BAD_SIGNATURE),
        (Records(publisher=key(9)).message(number=7), Reason.UNKNOWN_KEY),
        (structs.replace(good, graphs=None, weights=None), Reason.MISSING_PART),
        (structs.replace(good, weights=weights(1.0)), Reason.WRONG_DIGEST),
    ]
    for message, reason in cases:
        bench.tell(FIRST, ROOT)
        with pytest.raises(RemoteProtocolError) as caught:
            bench.tell(core.ReleaseFound("points", message))
        assert caught.value.reason is reason
        assert kinds(bench.tell(LAST)) == [core.PublishRelease, core.PublishOffer]
    with pytest.raises(RemoteProtocolError) as caught:
        bench.tell(core.ReleaseFound("other", good))
    assert caught.value.reason is Reason.WRONG_TASK


def test_our_own_release_spoilt_is_put_right() -> None:
    """What has our records' bytes and not their signatures, graphs or weights is no copy that a device can use."""
    bench = Bench()
    bench.begin()
    good = RECORDS.message()
    assert good.graphs is not None
    cases: list[tuple[ReleaseMessage, Reason]] = [
        (structs.replace(good, release=structs.replace(good.release, sig=bytes(64))), Reason.BAD_SIGNATURE),
        (structs.replace(good, manifest=structs.replace(good.manifest, sig=bytes(64))), Reason.BAD_SIGNATURE),
        (structs.replace(good, weights=weights(1.0)), Reason.WRONG_DIGEST),
        (structs.replace(good, graphs=structs.replace(good.graphs, train=good.graphs.eval)), Reason.WRONG_DIGEST),
        (structs.replace(good, v=2, weights=None), Reason.MISSING_PART),
    ]
    for message, reason in cases:
        bench.tell(FIRST, ROOT)
        with pytest.raises(RemoteProtocolError) as caught:
            bench.tell(core.ReleaseFound("points", message), *retained(bench)[1:])
        assert caught.value.reason is reason
        assert core.PublishRelease in kinds(bench.tell(LAST))


# -- an aggregator that went back in time ----------------------------------------------------------------------------


def restored(**changes: Any) -> tuple[Bench, Bench]:
    """An aggregator that went on for two rounds, and one that was restored from a backup made before them."""
    before = Bench()
    before.begin(RECORDS.message(RECORDS.manifest(**{"rounds": 100, **changes})))
    again = Bench()
    again.begin(RECORDS.message(RECORDS.manifest(**{"rounds": 100, **changes})))
    again.machine.ready = False
    task = again.machine.tasks["points"]
    task.restored = task.keyless = True
    for _ in range(2):
        run_round(before, {"loss": 1.0})
    return before, again


def test_a_restored_aggregator_adopts_what_the_broker_holds() -> None:
    """The newest release is adopted, then one with a number that nobody can know follows, and so does a round."""
    before, again = restored()
    newest = before.machine.tasks["points"].release
    effects = again.tell(FIRST, ROOT, core.ReleaseFound("points", _whole(before)), retained(before)[1], LAST)
    assert kinds(effects) == [
        core.ReviseRound,
        core.AbandonRound,
        core.AdoptRelease,
        core.MarkRound,
        core.RestoreRelease,
        core.PublishRelease,
        core.Recovered,
        core.OpenRound,
    ]
    assert ends(effects) == [(1, "superseded")]
    task = again.machine.tasks["points"]
    assert (task.release.number, task.release.weights) == (1002, newest.weights)
    (marked,) = only(effects, core.MarkRound)
    assert isinstance(marked, core.MarkRound)
    assert (marked.offer.round, marked.offer.state, marked.known) == (3 + 48, OfferState.CLOSED, False)
    assert again.offer.round == 52
    # A device that knows the newest offer and release of before believes what follows.
    manifest_signed, manifest = task.manifest_signed, task.manifest
    assert trust.offer(marked.signed, manifest_signed, manifest).round > before.offer.round
    assert RECORDS.trust.release(task.release_signed, manifest_signed, manifest).number > newest.number
    assert not task.restored


def _whole(bench: Bench) -> ReleaseMessage:
    """The newest release as it travels, its weights inside."""
    task = bench.machine.tasks["points"]
    number = task.release.number
    message = structs.replace(RECORDS.message(), manifest=task.manifest_signed, release=task.release_signed)
    return structs.replace(message, weights=weights(float(number)) if number else message.weights)


def test_a_restored_aggregator_and_an_empty_broker() -> None:
    """Devices may know more than both: numbers are left out all the same."""
    _, again = restored()
    effects = again.tell(FIRST, ROOT, LAST)
    assert again.machine.tasks["points"].release.number == 1000
    assert [each.number for each in effects if isinstance(each, core.PublishRelease)] == [1000]
    assert again.offer.round == 1 + 49 + 1
    assert again.tell(FIRST, ROOT, *_kept(again), LAST) == []


def _kept(bench: Bench) -> list[core.Event]:
    task = bench.machine.tasks["points"]
    message = structs.replace(RECORDS.message(), manifest=task.manifest_signed, release=task.release_signed)
    assert task.offer_signed is not None
    return [core.ReleaseFound("points", message), core.OfferFound("points", task.offer_signed)]


def test_no_number_left_needs_a_manifest() -> None:
    """Where the plan has no round left that devices cannot know, a new version of the task is asked for."""
    again = Bench()
    again.begin(RECORDS.message(RECORDS.manifest(rounds=1)))
    again.machine.ready, again.machine.tasks["points"].restored = False, True
    effects = again.tell(FIRST, ROOT, LAST)
    (told,) = only(effects, core.Recovered)
    assert isinstance(told, core.Recovered) and told.needs_manifest
    assert again.machine.tasks["points"].phase == "needs_manifest"
    assert only(effects, core.OpenRound) == []
    assert only(again.tell(core.ReleaseReceived(RECORDS.message(RECORDS.manifest(version=2)))), core.OpenRound)


@pytest.mark.parametrize("closed", [False, True])
def test_a_last_round_that_a_backup_ended_is_closed_on_the_broker(closed: bool) -> None:
    """Devices would go on training for an offer that is still open there."""
    again = Bench()
    again.begin(RECORDS.message(RECORDS.manifest(rounds=1)))
    kept = retained(again)
    if closed:
        for device in "abc":
            again.update(device)
    task = again.machine.tasks["points"]
    # As a backup comes back: the round has ended, its offer is as it was.
    task.round = task.closing = None
    again.machine.ready, task.restored = False, True
    effects = again.tell(FIRST, ROOT, *kept, LAST)
    said = [each for each in effects if isinstance(each, core.MarkRound | core.PublishOffer)]
    offers = [wire.unpack(each.signed.payload, RoundOffer) for each in said]
    assert [(each.sequence, each.state) for each in offers] == [(1, OfferState.CLOSED)]
    assert task.phase == "needs_manifest"


def test_a_finished_task_stays_finished() -> None:
    """The broker's word that all rounds are done is adopted, and the task is at its end and not in need."""
    before, again = restored(rounds=2)
    effects = again.tell(FIRST, ROOT, core.ReleaseFound("points", _whole(before)), retained(before)[1], LAST)
    task = again.machine.tasks["points"]
    assert (task.phase, task.last_round, again.offer.state) == ("finished", 2, OfferState.FINISHED)
    assert again.offer.sequence == before.offer.sequence + 1
    assert only(effects, core.OpenRound) == []


def test_an_aggregator_without_a_memory_adopts_its_own_tasks() -> None:
    """A lost state directory costs no task whose newest release is on the broker."""
    before, _ = restored()
    fresh = Bench()
    effects = fresh.tell(FIRST, ROOT, core.ReleaseFound("points", _whole(before)), retained(before)[1], LAST)
    assert kinds(effects)[:1] == [core.AdoptRelease]
    assert fresh.machine.tasks["points"].release.number == 1002
    assert fresh.machine.tasks["points"].last_round == 3 + 48


@pytest.mark.parametrize("memory", ["none", "backup"])
def test_read_back_under_a_clock_that_is_ahead(memory: str) -> None:
    """Numbers are left out all the same, and rounds go on once the clock is right."""
    before, again = restored()
    if memory == "none":
        again = Bench()
    right = again.now
    again.now = Instant(right.mono, RECORDS.manifest().expires + 1.0)
    effects = again.tell(FIRST, ROOT, core.ReleaseFound("points", _whole(before)), retained(before)[1], LAST)
    assert only(effects, core.MarkRound) and not only(effects, core.OpenRound)
    task = again.machine.tasks["points"]
    assert (task.release.number, task.last_round, task.restored) == (1002, 51, False)
    assert task.phase == ("finished" if memory == "backup" else "waiting")
    again.now = Instant(right.mono + 60, right.utc + 60)
    assert only(again.tell(*(core.StatusReceived(each, status()) for each in "abc")), core.OpenRound)
    assert again.offer.round == 52


def test_the_retired_publishers_of_what_is_retained() -> None:
    """A manifest may have expired, its publisher's key must not have."""
    again = Bench()
    again.now = Instant(NOW.mono, RECORDS.root.publishers[0].expires + 1.0)
    with pytest.raises(RemoteProtocolError) as caught:
        again.tell(FIRST, ROOT, core.ReleaseFound("points", RECORDS.message(number=7)))
    assert caught.value.reason is Reason.EXPIRED


@pytest.mark.parametrize("memory", ["none", "an older manifest"])
@pytest.mark.parametrize("whole", [False, True])
def test_what_the_broker_knows_outranks_what_is_published_again(memory: str, whole: bool) -> None:
    """Release 0 on models/release does not take the place of release 5 whose chunks are on their way."""
    again, fetch = _behind(memory, whole)
    assert again.tell(core.ReleaseReceived(_second(0, whole))) == []
    with pytest.raises(RemoteProtocolError) as caught:
        again.tell(core.ReleaseReceived(RECORDS.message(RECORDS.manifest(version=1, rounds=7))))
    assert caught.value.reason is (Reason.EQUIVOCATION if memory == "an older manifest" else Reason.ROLLBACK)
    effects = again.tell(core.WeightsArrived(fetch.found))
    assert [each.release.number for each in effects if isinstance(each, core.AdoptRelease)] == [5]
    assert again.machine.tasks["points"].release.number == 5 + 1000
    assert again.tell(core.ReleaseReceived(_second(0, whole))) == []


@pytest.mark.parametrize("memory", ["none", "an older manifest"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_manifest_whose_weights_cannot_be_had_needs_its_publisher(memory: str, whole: bool) -> None:
    """Nothing goes on under an older manifest; published again it goes on above all that devices know of it."""
    again, fetch = _behind(memory, whole)
    assert again.tell(core.WeightsLost(fetch.found)) == []
    if memory != "none":
        assert again.machine.tasks["points"].phase == "needs_manifest"
    assert again.tell(*(core.StatusReceived(each, status(v=2)) for each in "def")) == []
    # The next connection tries again.
    again.tell(FIRST, ROOT, core.ReleaseFound("points", _second(5)), _third_offer(), LAST)
    assert again.tell(core.WeightsLost(fetch.found)) == []
    effects = again.tell(core.ReleaseReceived(_second(0, whole)))
    if not whole:
        (again_fetched,) = effects
        assert isinstance(again_fetched, core.FetchWeights)
        effects = again.tell(core.WeightsArrived(again_fetched.found))
    task = again.machine.tasks["points"]
    assert (task.manifest.version, task.release.number, task.phase) == (2, 5 + 1000, "collecting")
    assert [each.offer.round for each in effects if isinstance(each, core.OpenRound)] == [52]


def test_one_release_on_both_topics() -> None:
    """Whichever the shell began to fetch, its weights are those of what the broker knows of the task."""
    for lost in (False, True):
        again, fetch = _behind("an older manifest", False)
        published = replace(fetch.found, kept=False)
        effects = again.tell(core.WeightsLost(published) if lost else core.WeightsArrived(published))
        assert bool(only(effects, core.AdoptRelease)) is not lost
        assert again.machine.tasks["points"].phase == ("needs_manifest" if lost else "collecting")


@pytest.mark.parametrize("lost", [False, True])
def test_an_offer_that_comes_after_the_barrier(lost: bool) -> None:
    """The broker may answer in any order: what devices know of a task that is only coming counts all the same."""
    again, fetch = _behind("none", False, offered=False)
    assert again.tell(_third_offer(), _third_offer(round=2)) == []
    if lost:
        again.tell(core.WeightsLost(fetch.found))
        again.tell(core.ReleaseReceived(_second(0, whole=True)))
    else:
        again.tell(core.WeightsArrived(fetch.found))
    assert (again.machine.tasks["points"].last_round, again.offer.round) == (52, 52)


def test_a_newer_manifest_ends_the_need() -> None:
    """Whatever is lost, a version above all others is followed."""
    again, fetch = _behind("an older manifest", False)
    again.tell(core.WeightsLost(fetch.found))
    effects = again.tell(core.ReleaseReceived(RECORDS.message(RECORDS.manifest(version=3))))
    assert only(effects, core.OpenRound)
    assert again.machine.tasks["points"].release.number == 0
    assert again.tell(core.WeightsLost(fetch.found)) == []
    assert again.machine.tasks["points"].phase == "collecting"


def _second(number: int, whole: bool = False) -> ReleaseMessage:
    """A release of manifest 2, its weights inside or in chunks."""
    manifest = RECORDS.sign_manifest(RECORDS.manifest(version=2, rounds=100))
    if whole:
        return structs.replace(RECORDS.message(), manifest=manifest, release=RECORDS.release(manifest, number))
    blob = BlobRef(bytes(32), 100, 60, [bytes(32), bytes(32)])
    record = RECORDS.release(manifest, number, v=2, weights=blob)
    return structs.replace(RECORDS.message(), v=2, manifest=manifest, release=record, weights=None)


def _third_offer(**changes: object) -> core.OfferFound:
    """Round 3, on the fifth release of the second manifest."""
    return core.OfferFound("points", RECORDS.sign_offer(RECORDS.offer(_second(5), 3, **changes)))


def _behind(memory: str, whole: bool, offered: bool = True) -> tuple[Bench, core.FetchWeights]:
    """An aggregator that learns of release 5 of manifest 2, after three rounds, and fetches it."""
    again = Bench()
    if memory != "none":
        again.begin(devices="")
    again.tell(*(core.StatusReceived(each, status(v=2)) for each in "abc"))
    again.machine.ready = False
    found: list[core.Event] = [core.ReleaseFound("points", _second(5)), *([_third_offer()] if offered else [])]
    (fetch,) = only(again.tell(FIRST, ROOT, *found, LAST), core.FetchWeights)
    assert isinstance(fetch, core.FetchWeights)
    return again, fetch


@pytest.mark.parametrize("late", [False, True])
def test_an_offer_without_its_release_still_counts(late: bool) -> None:
    """Release 0 alone came back, but an offer of its manifest says that rounds were given: they are not given again."""
    again, offer = Bench(), [_third_offer()]
    again.tell(*(core.StatusReceived(each, status(v=2)) for each in "abc"))
    again.machine.ready = False
    again.tell(FIRST, ROOT, *([] if late else offer), LAST, *(offer if late else []))
    effects = again.tell(core.ReleaseReceived(_second(0, whole=True)))
    assert again.offer.round > 3 and again.machine.tasks["points"].release.number == 1000
    assert all(each.offer.round > 3 for each in effects if isinstance(each, core.OpenRound))


def test_two_releases_of_one_number() -> None:
    """Devices hold the broker's; ours goes on under a number that nobody has."""
    before, again = restored()
    again.machine.ready, task = True, again.machine.tasks["points"]
    task.restored = task.keyless = False
    run_round(again, {"loss": 7.0})
    run_round(again, {"loss": 8.0})
    ours = again.machine.tasks["points"].release.weights
    effects = again.tell(FIRST, ROOT, core.ReleaseFound("points", _whole(before)), LAST)
    assert only(effects, core.AdoptRelease) == []
    release = again.machine.tasks["points"].release
    assert (release.number, release.weights) == (1002, ours)


def test_weights_in_chunks_are_fetched_first() -> None:
    """Nothing opens meanwhile; what was adopted is what came, and what is lost leaves ours, above theirs."""
    before, again = restored()
    message = _chunked(before)
    offer = retained(before)[1]
    effects = again.tell(FIRST, ROOT, core.ReleaseFound("points", message), offer, LAST)
    assert kinds(effects) == [core.ReviseRound, core.AbandonRound, core.FetchWeights]
    assert again.machine.tasks["points"].phase == "catching_up"
    assert again.tell(core.StatusReceived("d", status(v=2))) == []
    (fetch,) = only(effects, core.FetchWeights)
    assert isinstance(fetch, core.FetchWeights)
    lost = Bench()
    lost.machine.tasks, lost.machine.devices, lost.machine.ready = again.machine.tasks, again.machine.devices, True
    arrived = lost.tell(core.WeightsLost(fetch.found))
    release = lost.machine.tasks["points"].release
    assert (release.number, release.v) == (2 + 1000, 1)
    assert kinds(arrived)[:2] == [core.MarkRound, core.RestoreRelease]


def test_weights_in_chunks_are_adopted_when_they_are_there() -> None:
    """Release, number and offer go on from the broker's."""
    before, again = restored()
    message = _chunked(before)
    (fetch,) = only(
        again.tell(FIRST, ROOT, core.ReleaseFound("points", message), retained(before)[1], LAST), core.FetchWeights
    )
    assert isinstance(fetch, core.FetchWeights)
    effects = again.tell(core.WeightsArrived(fetch.found))
    assert kinds(effects)[:3] == [core.AdoptRelease, core.MarkRound, core.RestoreRelease]
    release = again.machine.tasks["points"].release
    assert (release.number, release.v) == (1002, 2)
    assert again.machine.tasks["points"].last_round == 51


def _chunked(bench: Bench) -> ReleaseMessage:
    """The newest release as if its weights had been large."""
    task = bench.machine.tasks["points"]
    blob = BlobRef(bytes(32), 100, 60, [bytes(32), bytes(32)])
    record = structs.replace(task.release, v=2, weights=blob)
    signed = core.signer(RECORDS.aggregator)(record)
    return structs.replace(RECORDS.message(), v=2, manifest=task.manifest_signed, release=signed, weights=None)


def test_newer_after_the_barrier_is_adopted_as_well() -> None:
    """A broker that answers in another order only makes it later."""
    before, again = restored()
    again.machine.tasks["points"].restored = False
    again.tell(FIRST, ROOT, LAST)
    effects = again.tell(core.ReleaseFound("points", _whole(before)))
    assert only(effects, core.AdoptRelease)
    assert again.machine.tasks["points"].release.number == 1002
    ahead = structs.replace(again.offer, round=90, sequence=4)
    effects = again.tell(core.OfferFound("points", core.signer(RECORDS.aggregator)(ahead)))
    assert again.machine.tasks["points"].last_round > 90
    with pytest.raises(RemoteProtocolError):
        again.tell(core.OfferFound("points", structs.replace(RECORDS.sign_offer(ahead), sig=bytes(64))))


def test_our_own_words_come_back_and_change_nothing() -> None:
    """We hear what we publish, also what we have replaced since."""
    bench = Bench()
    bench.begin()
    old = retained(bench)
    run_round(bench, {})
    for event in [*old, *_newest(bench)]:
        assert bench.tell(event) == []


def _newest(bench: Bench) -> list[core.Event]:
    return [core.ReleaseFound("points", _whole(bench)), *retained(bench)[1:]]


def test_an_offer_of_the_manifest_before_ours_is_replaced() -> None:
    """It is refused when it comes live, and is no obstacle when it is retained."""
    bench = Bench()
    bench.begin()
    old = retained(bench)[1]
    bench.tell(core.ReleaseReceived(RECORDS.message(RECORDS.manifest(version=2))))
    with pytest.raises(RemoteProtocolError):
        bench.tell(old)
    assert kinds(bench.tell(FIRST, ROOT, old, LAST)) == [core.PublishRelease, core.PublishOffer]


def test_a_publishers_release_in_chunks() -> None:
    """It enters once its weights are there, unless a newer one came first."""
    bench = Bench()
    bench.begin()
    manifest = RECORDS.sign_manifest(RECORDS.manifest(version=2))
    blob = BlobRef(bytes(32), 100, 60, [bytes(32), bytes(32)])
    release = RECORDS.release(manifest, v=2, weights=blob)
    message = structs.replace(RECORDS.message(), v=2, manifest=manifest, release=release, weights=None)
    (fetch,) = bench.tell(core.ReleaseReceived(message))
    assert isinstance(fetch, core.FetchWeights)
    assert bench.tell(core.WeightsLost(fetch.found)) == []
    assert bench.machine.tasks["points"].manifest.version == 1
    effects = bench.tell(core.WeightsArrived(fetch.found))
    assert kinds(effects) == [core.ReviseRound, core.AbandonRound, core.AdoptRelease, core.PublishRelease]
    bench.tell(core.ReleaseReceived(RECORDS.message(RECORDS.manifest(version=3))))
    with pytest.raises(RemoteProtocolError):
        bench.tell(core.WeightsArrived(fetch.found))


def test_weights_too_large_for_the_layout_are_not_fetched() -> None:
    """Nobody fills our disk with a model of six numbers."""
    bench = Bench()
    bench.tell(*UP)
    manifest = RECORDS.sign_manifest(RECORDS.manifest())
    blob = BlobRef(bytes(32), 1 << 40, 1 << 39, [bytes(32), bytes(32)])
    message = structs.replace(
        RECORDS.message(), v=2, manifest=manifest, release=RECORDS.release(manifest, v=2, weights=blob), weights=None
    )
    with pytest.raises(RemoteProtocolError) as caught:
        bench.tell(core.ReleaseReceived(message))
    assert caught.value.reason is Reason.TOO_LARGE


# -- roots -----------------------------------------------------------------------------------------------------------


def following(version: int, **changes: Any) -> RootMessage:
    """A root that follows, by the same root key."""
    root = structs.replace(RECORDS.root, version=version, **changes)
    signed = signing.sign(root, Role.ROOT, RECORDS.root_key)
    return RootMessage(2, signed, signed)


def test_roots_are_walked_one_by_one() -> None:
    """In whatever order they come; the newest is trusted, and a publisher that it does not name no more."""
    bench = Bench()
    third = following(3, publishers=[])
    assert bench.tell(FIRST, core.RootFound(3, third)) == []
    effects = bench.tell(core.RootFound(2, following(2)), LAST)
    assert effects == [core.AdoptRoot(2, following(2)), core.AdoptRoot(3, third)]
    assert bench.machine.trust.root.version == 3
    with pytest.raises(RemoteProtocolError):
        bench.tell(core.ReleaseReceived(RECORDS.message()))


def test_a_forged_root_changes_nothing() -> None:
    """Only who holds a key of the root before can replace it."""
    bench = Bench()
    stranger = Records(root_key=key(9))
    signed = signing.sign(structs.replace(stranger.root, version=2), Role.ROOT, key(9))
    with pytest.raises(RemoteProtocolError):
        bench.tell(core.RootFound(2, RootMessage(2, signed, signed)))
    assert bench.machine.trust.root == RECORDS.root


def test_another_root_in_the_place_of_ours_is_replaced() -> None:
    """Junk that decodes is not taken for ours."""
    bench = Bench()
    effects = bench.tell(FIRST, core.RootFound(1, following(1, publishers=[])), LAST)
    assert effects == [core.PublishRoot(1)]
