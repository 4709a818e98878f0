"""The agent's machine: what it believes, when it trains, what it says."""

import dataclasses
import math
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from edge_agent import delivery, download
from edge_agent import participation as core
from edge_agent.eligibility import DeviceFacts, Policy
from edge_agent.jobs import Done, Failed, Judged, Progress, Suspended
from edge_agent.participation import Effect, Participation
from edge_agent.quality import Quality
from shared import chunks, signing, wire
from shared.errors import Reason, RemoteProtocolError
from shared.layout import weights_max
from shared.machine import Instant, Tick
from shared.messages import (
    BlobRef,
    Conditions,
    Missing,
    OfferState,
    Outcome,
    Receipt,
    ReleaseMessage,
    Role,
    UpdateContext,
    UpdateHead,
)
from shared.selection import draw
from shared.trust import Position
from tests.records import NOW, Records, counted, later

RECORDS = Records()
MESSAGE = RECORDS.message()
POLICY = Policy(settle=0.0, patience=10.0, sense=30.0, sense_training=5.0)
FACTS = DeviceFacts(
    local=datetime(2026, 1, 1, tzinfo=UTC),
    cpu_pressure=0.0,
    memory_free=1 << 40,
    disk_free=1 << 40,
)


@dataclass
class Bench:
    """A device under test; `facts` is what its sensors read."""

    machine: Participation = field(
        default_factory=lambda: Participation(
            trust=RECORDS.trust,
            policy=POLICY,
            device="sensor-1",
            certificate=b"certificate",
            datasets=frozenset({"points"}),
            random=counted(),
            timeout=600.0,
            idle_exit=120.0,
        )
    )
    now: Instant = NOW
    facts: DeviceFacts = FACTS
    effects: list[Effect] = field(default_factory=list)

    def tell(self, *events: core.Event) -> list[Effect]:
        """Handle events and what their effects find out, as the driver does."""
        start = len(self.effects)
        for event in events:
            found = self.machine.handle(event, self.now)
            self.effects += found
            if any(isinstance(each, core.Sense) for each in found):
                self.tell(core.Sensed(self.facts))
        return self.effects[start:]

    def after(self, seconds: float) -> list[Effect]:
        """Let time pass, waking whenever the machine wants to."""
        start, end = len(self.effects), self.now.mono + seconds
        for _ in range(10_000):
            due = self.machine.deadline
            if due is None or due > end:
                self.now = later(end - self.now.mono, self.now)
                return self.effects[start:]
            self.now = later(max(0.0, due - self.now.mono), self.now)
            self.tell(Tick())
        raise AssertionError("the machine wakes for ever without a reason")

    def begin(self, message: ReleaseMessage = MESSAGE, **offer: Any) -> list[Effect]:
        """Connected, sensed, with a release and an offer."""
        self.tell(core.Connected(), Tick(), core.ReleaseArrived("points", message))
        return self.offer(message, **offer)

    def offer(self, message: ReleaseMessage = MESSAGE, **changes: Any) -> list[Effect]:
        """An offer arrives."""
        return self.tell(core.OfferArrived("points", RECORDS.sign_offer(RECORDS.offer(message, **changes))))

    def done(self) -> list[Effect]:
        """The trainer has finished the job."""
        assert self.machine.work is not None
        result = Done(self.machine.work.id, bytes(80), 100, bytes(32), 40, 10, 10, {"loss": 1.0}, 0.5, 1.0, 1.0, 1.0, 1)
        return self.tell(core.TrainerTold(result))

    def refused(self, event: core.Event) -> Reason:
        """Why an event is refused; nothing has changed."""
        before = repr(self.machine)
        with pytest.raises(RemoteProtocolError) as caught:
            self.machine.handle(event, self.now)
        assert repr(self.machine) == before
        return caught.value.reason


def kinds(effects: list[Effect]) -> list[str]:
    """The effects' names, looks at the sensors apart."""
    return [type(each).__name__ for each in effects if not isinstance(each, core.Sense)]


# -- records -----------------------------------------------------------------------------------------------------


def test_a_release_and_an_offer_lead_to_training() -> None:
    """Both are stored first; the job is bound to this very offer."""
    bench = Bench()
    effects = bench.begin()
    assert kinds(effects) == ["KeepOffer", "KeepJob", "Train"]
    (train,) = [each for each in effects if isinstance(each, core.Train)]
    context = wire.unpack(train.context, UpdateContext)
    assert (context.device, context.round, context.dimension) == ("sensor-1", 1, 6)
    assert (context.manifest, context.release) == (train.offer.manifest, train.offer.release)


def test_an_offer_may_come_before_its_release() -> None:
    """Retained topics arrive in any order."""
    bench = Bench()
    bench.tell(core.Connected(), Tick())
    assert kinds(bench.offer()) == []
    assert kinds(bench.tell(core.ReleaseArrived("points", MESSAGE))) == [
        "KeepRelease",
        "UseRelease",
        "KeepOffer",
        "KeepJob",
        "Train",
    ]


def test_releases_that_are_refused() -> None:
    """Older, forked, expired, of another task, in parts, of a stranger: a reason each, nothing changed."""
    bench = Bench()
    bench.begin(RECORDS.message(RECORDS.manifest(version=2), number=3))

    def arrives(message: ReleaseMessage, task: str = "points") -> Reason:
        return bench.refused(core.ReleaseArrived(task, message))

    two = RECORDS.manifest(version=2)
    assert arrives(RECORDS.message(RECORDS.manifest(version=1), number=9)) is Reason.ROLLBACK
    assert arrives(RECORDS.message(two, number=2)) is Reason.ROLLBACK
    assert arrives(RECORDS.message(two, number=3, value=1.0)) is Reason.EQUIVOCATION
    assert arrives(RECORDS.message(RECORDS.manifest(version=2, goal=9), number=4)) is Reason.EQUIVOCATION
    assert arrives(RECORDS.message(two, number=4), "other") is Reason.WRONG_TASK
    assert arrives(RECORDS.message(RECORDS.manifest(version=3, expires=int(NOW.utc)))) is Reason.EXPIRED
    assert arrives(structs.replace(RECORDS.message(two, number=4), v=2, weights=None)) is Reason.MISSING_PART
    by_aggregator = signing.sign(RECORDS.manifest(version=3), Role.AGGREGATOR, RECORDS.aggregator)
    assert arrives(structs.replace(MESSAGE, manifest=by_aggregator)) is Reason.WRONG_ROLE
    assert arrives(RECORDS.message(RECORDS.manifest(version=3, opset=7))) is Reason.UNSUPPORTED


def test_the_same_release_again_is_nothing_new() -> None:
    """It is retained and comes on every connect."""
    bench = Bench()
    bench.begin()
    assert bench.tell(core.ReleaseArrived("points", MESSAGE)) == []


def test_a_stolen_aggregator_ships_no_graph() -> None:
    """A later release of the same manifest with another graph is not what the publisher signed."""
    bench = Bench()
    bench.begin()
    later_release = RECORDS.message(number=1)
    assert later_release.graphs is not None
    swapped = structs.replace(later_release.graphs, train=later_release.graphs.eval)
    event = core.ReleaseArrived("points", structs.replace(later_release, graphs=swapped))
    assert bench.refused(event) is Reason.WRONG_DIGEST


def test_offers_that_are_refused() -> None:
    """Older, forked, lower participation, shorter deadline, wider clip, unknown key."""
    bench = Bench()
    bench.begin(number=2, sequence=1)

    def arrives(**changes: Any) -> Reason:
        signed = RECORDS.sign_offer(RECORDS.offer(MESSAGE, **changes))
        return bench.refused(core.OfferArrived("points", signed))

    assert arrives(number=1, sequence=9) is Reason.ROLLBACK
    assert arrives(number=2, sequence=0) is Reason.ROLLBACK
    assert arrives(number=2, sequence=1, participation=5) is Reason.EQUIVOCATION
    assert arrives(number=2, sequence=2, participation=5) is Reason.OFFER_BOUNDS
    assert arrives(number=2, sequence=2, deadline=int(NOW.utc)) is Reason.OFFER_BOUNDS
    assert arrives(number=3, clip=11.0) is Reason.OFFER_BOUNDS
    forged = signing.sign(RECORDS.offer(MESSAGE, number=3), Role.AGGREGATOR, RECORDS.publisher)
    assert bench.refused(core.OfferArrived("points", forged)) is Reason.UNKNOWN_KEY


def test_positions_survive_a_restart() -> None:
    """With the stored positions an older release or offer is refused, and the offer of before is taken up again."""
    bench = Bench()
    bench.begin(number=2)
    again = Bench()
    kept = bench.machine.tasks["points"]
    again.machine.tasks["points"] = core.Task(
        "points",
        kept.manifest_signed,
        kept.manifest,
        kept.release,
        kept.manifest_position,
        kept.release_position,
        kept.offer_position,
    )
    old = core.OfferArrived("points", RECORDS.sign_offer(RECORDS.offer(MESSAGE, number=1)))
    assert again.refused(old) is Reason.ROLLBACK
    again.tell(core.Connected(), Tick())
    assert kinds(again.offer(number=2)) == ["KeepOffer", "KeepJob", "Train"]


def test_a_device_follows_so_many_tasks_and_no_more() -> None:
    """Names on topics cost no memory without end, and a task that has expired makes room."""
    bench = Bench()
    for number in range(2 * core.TASKS_MAX):
        bench.tell(core.OfferArrived(f"task-{number}", MESSAGE.manifest))
    assert bench.machine.tasks == {}
    assert list(bench.machine._early) == [f"task-{core.TASKS_MAX + number}" for number in range(core.TASKS_MAX)]
    for number in range(core.TASKS_MAX):
        bench.machine.tasks[f"task-{number}"] = core.Task(f"task-{number}", manifest=RECORDS.manifest())
    assert bench.refused(core.ReleaseArrived("points", MESSAGE)) is Reason.TOO_LARGE
    bench.machine.tasks["task-7"].manifest = RECORDS.manifest(expires=int(NOW.utc))
    bench.machine.delivery.resume(delivery.Update("id", "task-7", (1, 1), b"head", bytes(32), 1, 1, 0, 1 << 40), 0.0)
    assert kinds(bench.tell(core.ReleaseArrived("points", MESSAGE))) == [
        "DropUpdate",
        "ForgetTask",
        "KeepRelease",
        "UseRelease",
    ]
    assert "task-7" not in bench.machine.tasks


# -- when it trains ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "offer",
    [
        {"state": OfferState.CLOSED},
        {"state": OfferState.FINISHED},
        {"release": bytes(32)},
        {"participation": draw("points", 1, 1, "sensor-1")},
        {"participation": 0},
    ],
)
def test_it_does_not_train(offer: dict[str, Any]) -> None:
    """Unless the offer is open, for the release it holds, and selects this device."""
    assert "Train" not in kinds(Bench().begin(**offer))


def test_it_trains_when_a_re_issue_selects_it() -> None:
    """Participation was raised because others went away."""
    bench = Bench()
    bench.begin(participation=0)
    assert kinds(bench.offer(sequence=1)) == ["KeepOffer", "KeepJob", "Train"]


def test_no_data_no_training() -> None:
    """A task whose data set this device has not is followed, not trained."""
    bench = Bench()
    bench.machine.datasets = frozenset({"other"})
    assert kinds(bench.begin()) == ["KeepOffer"]


def test_an_expired_manifest_trains_nothing() -> None:
    """Its release is kept for local use."""
    bench = Bench()
    bench.tell(core.Connected(), Tick(), core.ReleaseArrived("points", MESSAGE))
    bench.now = later(10**6)
    bench.tell(Tick())
    assert "Train" not in kinds(bench.offer())


def test_the_owner_comes_first() -> None:
    """On battery nothing starts, and it starts once the device is back on mains."""
    bench = Bench(facts=changed(FACTS, mains=False))
    assert kinds(bench.begin()) == ["KeepOffer"]
    bench.facts = FACTS
    assert "Train" in kinds(bench.after(31))


def test_what_stands_in_the_way_from_the_start_is_told_once() -> None:
    """A device that was never eligible says why in its log, though nothing changed; a second look says nothing new."""
    bench = Bench(facts=replace(FACTS, paused=True))
    told = [each for each in bench.tell(core.Connected(), Tick()) if isinstance(each, core.EligibilityChanged)]
    assert [(each.eligible, len(each.obstacles)) for each in told] == [(False, 1)]
    assert not any(isinstance(each, core.EligibilityChanged) for each in bench.after(100))


def test_nothing_starts_before_the_device_has_settled() -> None:
    """That nothing stands in the way at this moment is not enough: it must have been so for a while."""
    bench = Bench()
    bench.machine = dataclasses.replace(bench.machine, policy=changed(POLICY, settle=60.0))
    assert kinds(bench.begin()) == ["KeepOffer"]
    assert "Train" not in kinds(bench.after(59))
    assert "Train" in kinds(bench.after(2))


def test_unplugged_in_the_middle() -> None:
    """The trainer stands still with the reason, and goes on when power is back in time: nothing is lost."""
    bench = Bench()
    bench.begin()
    work = bench.machine.work
    assert work is not None
    before = work.deadline
    bench.facts = changed(FACTS, mains=False)
    (frozen,) = [each for each in bench.after(6) if isinstance(each, core.FreezeTraining)]
    assert [obstacle.name.value for obstacle in frozen.obstacles] == ["mains"] and work.state == "frozen"
    assert "FreezeTraining" not in kinds(bench.after(60))
    bench.facts = FACTS
    (thawed,) = [each for each in bench.after(31) if isinstance(each, core.ThawTraining)]
    assert 60 <= thawed.seconds <= 91 and work.state == "training" and bench.machine.work is work
    assert work.deadline == before + thawed.seconds  # it had no time to use
    bench.done()
    assert "SendUpdate" in kinds(bench.effects)


def trains(bench: Bench) -> None:
    """The trainer has begun with the examples, so that there is something to keep."""
    assert bench.machine.work is not None
    bench.tell(core.TrainerTold(Progress(bench.machine.work.id, "training", 1, 3, 1, 30)))


def leave(bench: Bench, kept: bool = True) -> list[Effect]:
    """The trainer has left its work."""
    assert bench.machine.work is not None
    return bench.tell(core.TrainerTold(Suspended(bench.machine.work.id, kept)))


def test_unplugged_for_long() -> None:
    """After the grace the job is left with a checkpoint, its memory freed, and the very same job is gone on with."""
    bench = Bench()
    (first,) = [each for each in bench.begin() if isinstance(each, core.Train)]
    trains(bench)
    bench.facts = changed(FACTS, mains=False)
    assert "LeaveTraining" not in kinds(bench.after(6 + POLICY.grace - 10))
    (leaving,) = [each for each in bench.after(15) if isinstance(each, core.LeaveTraining)]
    assert (leaving.id, leaving.why, len(leaving.obstacles)) == (first.id, "obstacles", 1)
    assert kinds(leave(bench)) == ["TrainingLeft", "RestTrainer"]
    assert bench.machine.work is None and bench.machine.last_trained is None
    bench.facts = FACTS
    effects = bench.after(31)
    (again,) = [each for each in effects if isinstance(each, core.Train)]
    assert (again.id, again.seed, again.context, again.again) == (first.id, first.seed, first.context, True)
    assert "KeepJob" not in kinds(effects) and not first.again
    assert "DropJob" in kinds(bench.done())


@pytest.mark.parametrize("facts", [{"paused": True}, {"memory_pressure": 50.0}, {"disk_free": 0}])
def test_what_will_not_soon_be_over(facts: dict[str, Any]) -> None:
    """The owner's word, and want of memory or room, do not wait for the grace; also when it is frozen already."""
    bench = Bench()
    bench.begin()
    trains(bench)
    bench.facts = changed(FACTS, **facts)
    effects = bench.after(16)
    assert "LeaveTraining" in kinds(effects) and "FreezeTraining" not in kinds(effects)
    frozen = Bench()
    frozen.begin()
    trains(frozen)
    frozen.facts = changed(FACTS, mains=False)
    assert "FreezeTraining" in kinds(frozen.after(6))
    frozen.facts = changed(FACTS, mains=False, **facts)
    assert "LeaveTraining" in kinds(frozen.after(16))


def test_grace_of_none() -> None:
    """An owner who wants the memory back at once has it."""
    bench = Bench()
    bench.machine = dataclasses.replace(bench.machine, policy=changed(POLICY, grace=0.0))
    bench.begin()
    trains(bench)
    bench.facts = changed(FACTS, mains=False)
    effects = kinds(bench.after(6))
    assert "LeaveTraining" in effects and "FreezeTraining" not in effects


def test_about_to_go_on() -> None:
    """When all is well again just before the grace is over, the device settles first, and nothing is left."""
    bench = Bench()
    bench.machine = dataclasses.replace(bench.machine, policy=changed(POLICY, settle=60.0))
    bench.begin()
    bench.after(61)
    assert bench.machine.work is not None
    bench.facts = changed(FACTS, mains=False)
    bench.after(6 + POLICY.grace - 20)
    assert bench.machine.work.state == "frozen"
    bench.facts = FACTS
    effects = kinds(bench.after(90))
    assert "ThawTraining" in effects and "LeaveTraining" not in effects


def test_a_trainer_that_does_not_leave() -> None:
    """It is killed, and an older checkpoint may still help: the same job is begun again."""
    bench = Bench()
    (first,) = [each for each in bench.begin() if isinstance(each, core.Train)]
    trains(bench)
    bench.facts = changed(FACTS, paused=True)
    bench.after(6)
    effects = bench.after(core.LEAVING + 1)
    (stop,) = [each for each in effects if isinstance(each, core.StopTraining)]
    assert stop.kill and stop.why == "leaving" and "TrainingFailed" not in kinds(effects)
    bench.facts = FACTS
    assert [each.id for each in bench.after(31) if isinstance(each, core.Train)] == [first.id]


def test_a_trainer_that_dies_while_it_leaves() -> None:
    """That is no failure of the training."""
    bench = Bench()
    bench.begin()
    trains(bench)
    bench.facts = changed(FACTS, paused=True)
    bench.after(6)
    assert kinds(bench.tell(core.TrainerGone("killed", "signal 9"))) == ["TrainingLeft", "RestTrainer"]


def test_done_in_the_last_moment() -> None:
    """A trainer that was at its end when it was asked to leave has done its work."""
    bench = Bench()
    bench.begin()
    trains(bench)
    bench.facts = changed(FACTS, paused=True)
    bench.after(6)
    assert "SendUpdate" in kinds(bench.done()) and bench.machine.left == {}


def test_a_job_that_was_left_and_its_round_is_over() -> None:
    """The next round is trained from its own release, and the checkpoint is dropped."""
    for offer in ({"sequence": 1, "state": OfferState.CLOSED}, {"number": 2}):
        bench = Bench()
        (first,) = [each for each in bench.begin() if isinstance(each, core.Train)]
        trains(bench)
        bench.facts = changed(FACTS, paused=True)
        bench.after(6)
        leave(bench)
        dropped = [each.id for each in bench.offer(**offer) if isinstance(each, core.DropJob)]
        assert dropped == [first.id] and bench.machine.left == {}


def test_a_frozen_job_and_its_round_is_over() -> None:
    """It ends without running on, which the device has no room for."""
    bench = Bench()
    bench.begin()
    bench.facts = changed(FACTS, mains=False)
    bench.after(6)
    effects = bench.offer(number=2)
    (stop,) = [each for each in effects if isinstance(each, core.StopTraining)]
    assert stop.kill and "DropJob" in kinds(effects)
    assert bench.machine.work is None


def test_a_failed_job_is_begun_anew() -> None:
    """What went wrong may lie in the checkpoint."""
    bench = Bench()
    (first,) = [each for each in bench.begin() if isinstance(each, core.Train)]
    effects = bench.tell(core.TrainerTold(Failed(first.id, "not_finite", "nan")))
    assert kinds(effects) == ["TrainingFailed", "DropJob"]
    (second,) = [each for each in bench.after(core.RETRY_FIRST + 1) if isinstance(each, core.Train)]
    assert second.id != first.id and not second.again


def test_the_daemon_ends_in_the_middle() -> None:
    """It leaves its work first and begins nothing; the next process goes on with the very same job."""
    bench = Bench()
    effects = bench.begin()
    (job,) = [each.job for each in effects if isinstance(each, core.KeepJob)]
    trains(bench)
    effects = bench.tell(core.Leave())
    assert kinds(effects) == ["LeaveTraining"] and bench.tell(core.Leave()) == []
    assert kinds(leave(bench)) == ["TrainingLeft", "RestTrainer", "Left"]
    assert "Train" not in kinds(bench.offer(sequence=1)) + kinds(bench.after(100))
    again = Bench()
    task = bench.machine.tasks["points"]
    task = replace(task, offer=None, waiting_offer=None)
    used = {"points": task.used or b""}
    assert again.machine.restore([task], [], NOW, [job, structs.replace(job, id="older")], used) == [
        core.DropJob("older")
    ]
    again.tell(core.Connected(), Tick())
    (train,) = [each for each in again.offer(sequence=1) if isinstance(each, core.Train)]
    assert (train.id, train.seed, train.context, train.again) == (job.id, job.seed, job.context, True)


@pytest.mark.parametrize("phase", [None, "loading", "evaluating"])
def test_a_trainer_with_nothing_to_keep(phase: Any) -> None:
    """One that is still starting or reading is not waited for: it ends at once, and the same job begins again later."""
    bench = Bench()
    (first,) = [each for each in bench.begin() if isinstance(each, core.Train)]
    if phase is not None:
        bench.tell(core.TrainerTold(Progress(first.id, phase)))
    bench.facts = changed(FACTS, paused=True)
    effects = bench.after(6)
    assert [each.kill for each in effects if isinstance(each, core.StopTraining)] == [True]
    assert "TrainingLeft" in kinds(effects) and "LeaveTraining" not in kinds(effects)
    bench.facts = FACTS
    (again,) = [each for each in bench.after(31) if isinstance(each, core.Train)]
    assert (again.id, again.seed, again.again) == (first.id, first.seed, True)
    assert kinds(bench.tell(core.Leave())) == ["StopTraining", "TrainingLeft", "RestTrainer", "Left"]


def test_the_daemon_ends_at_rest() -> None:
    """Nothing keeps it."""
    assert kinds(Bench().tell(core.Leave())) == ["Left"]


def test_jobs_that_no_longer_count() -> None:
    """Of a task that is gone, of an older manifest, expired, or done already: dropped at the start."""
    bench = Bench()
    (job,) = [each.job for each in bench.begin() if isinstance(each, core.KeepJob)]
    task = bench.machine.tasks["points"]
    assert task.manifest is not None and task.used is not None
    used = {"points": task.used}
    cases: list[tuple[dict[str, Any], Instant, tuple[int, int]]] = [
        ({"task": "gone"}, NOW, (0, 0)),
        ({"position": (2, 1)}, NOW, (0, 0)),
        ({}, replace(NOW, utc=float(task.manifest.expires)), (0, 0)),
        ({}, NOW, (1, 1)),
    ]
    for changes, moment, settled in cases:
        tasks = [replace(task, settled=settled)]
        jobs = [structs.replace(job, **changes)]
        assert Bench().machine.restore(tasks, [], moment, jobs, used) == [core.DropJob(job.id)]
    assert Bench().machine.restore([replace(task)], [], NOW, [job], used) == []


def test_the_publishers_conditions_hold_while_it_trains() -> None:
    """An owner who does not ask for mains still stops a task that does."""
    bench = Bench()
    bench.machine.policy = changed(POLICY, mains=False)
    message = RECORDS.message(RECORDS.manifest(conditions=Conditions(mains=True)))
    assert "Train" in kinds(bench.begin(message))
    trains(bench)
    bench.facts = changed(FACTS, mains=False)
    assert "FreezeTraining" in kinds(bench.after(6))
    bench.after(POLICY.grace)
    leave(bench)
    bench.after(100)
    assert bench.machine.work is None


def test_the_publishers_conditions_hold_before_it_trains() -> None:
    """A device whose owner allows the battery is eligible, and still does not start a task that asks for mains."""
    bench = Bench(facts=changed(FACTS, mains=False))
    bench.machine.policy = changed(POLICY, mains=False)
    message = RECORDS.message(RECORDS.manifest(conditions=Conditions(mains=True)))
    assert "Train" not in kinds(bench.begin(message))
    assert bench.machine.eligible
    bench.facts = FACTS
    assert "Train" in kinds(bench.after(31))


def test_an_idle_device_is_looked_at_before_it_starts() -> None:
    """Where the kernel wakes us for load, the last look is minutes old: what it saw of power decides no start."""
    bench = Bench(facts=changed(FACTS, watched=True))
    bench.tell(core.Connected(), Tick(), core.ReleaseArrived("points", MESSAGE))
    looks = [each for each in bench.after(600) if isinstance(each, core.Sense)]
    assert len(looks) == 2
    bench.now = later(5.0, bench.now)
    bench.facts = changed(FACTS, watched=True, mains=False)
    assert "Train" not in kinds(bench.offer())
    assert not bench.machine.eligible
    bench.facts = changed(FACTS, watched=True)
    assert "Train" in kinds(bench.after(31))


def test_pressure_that_our_own_trainer_makes_stops_nothing() -> None:
    """The kernel's triggers count every task: what they call for is judged by what others use."""
    bench = Bench()
    bench.begin()
    bench.facts = changed(FACTS, training=True, watched=True, cpu_pressure=99.0, io_pressure=99.0, cpu_others=3.0)
    bench.tell(core.Wake())
    assert "FreezeTraining" not in kinds(bench.after(60))
    bench.facts = changed(bench.facts, cpu_others=90.0)
    assert "FreezeTraining" in kinds(bench.after(16))


def test_one_update_a_round() -> None:
    """After it is sent, the same round is not trained again, also after a re-issue; the next round is."""
    bench = Bench()
    bench.begin()
    effects = kinds(bench.done())
    assert "SendUpdate" in effects and "Train" not in effects
    assert "Train" not in kinds(bench.offer(sequence=1))
    assert "Train" in kinds(bench.offer(number=2))


def test_the_head_is_of_this_device() -> None:
    """What the shell signs holds the context that was sealed, the certificate and the result's hashes."""
    bench = Bench()
    (train,) = [each for each in bench.begin() if isinstance(each, core.Train)]
    (send,) = [each for each in bench.done() if isinstance(each, delivery.SendUpdate)]
    head = wire.unpack(send.update.head, UpdateHead)
    assert (head.context, head.certificate, head.size) == (train.context, b"certificate", 100)
    assert send.update.digest == sha256(send.update.head).digest()
    assert send.update.position == (1, 1)


def test_a_round_that_closes_ends_its_training() -> None:
    """The work would not count any more."""
    bench = Bench()
    bench.begin()
    effects = bench.offer(sequence=1, state=OfferState.CLOSED)
    assert [each.why for each in effects if isinstance(each, core.StopTraining)] == ["round_over"]
    assert "Train" in kinds(bench.offer(number=2))


def test_a_newer_round_ends_the_training_for_an_older_one() -> None:
    """A device that was away never hears that the older one closed."""
    bench = Bench()
    bench.begin()
    effects = bench.offer(number=2)
    assert [(each.round, each.why) for each in effects if isinstance(each, core.StopTraining)] == [(1, "round_over")]
    assert [each.offer.round for each in effects if isinstance(each, core.Train)] == [2]


def test_a_newer_manifest_ends_the_training_for_an_older_one() -> None:
    """Its rounds begin anew, and none of them counts as done because of what was trained before."""
    bench = Bench()
    bench.begin(number=5)
    second = RECORDS.message(RECORDS.manifest(version=2))
    effects = bench.tell(core.ReleaseArrived("points", second))
    assert [(each.round, each.why) for each in effects if isinstance(each, core.StopTraining)] == [(5, "superseded")]
    assert "Train" in kinds(bench.offer(second))
    (send,) = [each for each in bench.done() if isinstance(each, delivery.SendUpdate)]
    assert send.update.position == (2, 1)


def test_starts_are_spread() -> None:
    """With start_jitter the fleet does not wake at one instant."""
    message = RECORDS.message(RECORDS.manifest(start_jitter=1000))
    bench = Bench()
    assert "Train" not in kinds(bench.begin(message))
    assert "Train" in kinds(bench.after(1000))


def test_a_failure_is_tried_again_ever_more_slowly() -> None:
    """A trainer that crashes on every job does not spin."""
    bench = Bench()
    bench.begin()
    waits = []
    for _ in range(8):
        (failed,) = [
            each
            for each in bench.tell(core.TrainerGone("crashed", "exit status 1"))
            if isinstance(each, core.TrainingFailed)
        ]
        waits.append(failed.retry)
        assert "Train" not in kinds(bench.after(failed.retry - 1))
        assert "Train" in kinds(bench.after(2))
    assert waits == [60, 120, 240, 480, 960, 1920, 3600, 3600]


@pytest.mark.parametrize(("cause", "reason"), [("killed", "trainer_killed"), ("out_of_memory", "out_of_memory")])
def test_why_a_trainer_is_gone(cause: str, reason: str) -> None:
    """Want of memory is one reason, whether the trainer or the kernel noticed it."""
    bench = Bench()
    bench.begin()
    (failed,) = [
        each for each in bench.tell(core.TrainerGone(cause, "signal 9")) if isinstance(each, core.TrainingFailed)
    ]
    assert failed.reason == reason


def test_spacing_outlives_a_restart() -> None:
    """The end of a training is kept where the owner asks for spacing, and counts by the wall clock later."""
    spaced = changed(POLICY, spacing=3600.0)
    bench = Bench()
    bench.begin()
    assert "KeepTrained" not in kinds(bench.done())
    for end in ("done", "failed", "closed"):
        bench = Bench()
        bench.machine = dataclasses.replace(bench.machine, policy=spaced)
        bench.begin()
        if end == "done":
            effects = bench.done()
        elif end == "failed":
            effects = bench.tell(core.TrainerGone("killed", "signal 9"))
        else:
            effects = bench.offer(sequence=1, state=OfferState.CLOSED)
        assert kinds(effects).count("KeepTrained") == 1, end
    for trained, since in ((NOW.utc - 100, 100.0), (NOW.utc - 10**6, 10.0**6), (NOW.utc + 10**6, 0.0), (math.inf, 0.0)):
        again = dataclasses.replace(Bench().machine, policy=spaced)
        kept = kinds(again.restore([], [], NOW, trained=trained))
        assert again.last_trained == NOW.mono - since
        # What a clock that was ahead has told must not begin anew at every start.
        assert kept == (["KeepTrained"] if trained > NOW.utc else [])


def test_a_job_that_takes_too_long_is_ended() -> None:
    """A valid graph can still ask for too much."""
    bench = Bench()
    bench.begin()
    assert kinds(bench.after(601))[:2] == ["StopTraining", "TrainingFailed"]


def test_bad_data_are_told_and_mended() -> None:
    """The data set is no longer offered until a training with it works."""
    bench = Bench()
    bench.begin()
    assert bench.machine.work is not None
    effects = bench.tell(core.TrainerTold(Failed(bench.machine.work.id, "data", "x.npz: row 3: NaN")))
    said = [each for each in effects if isinstance(each, core.PublishStatus)]
    assert [(each.datasets, each.obstacles) for each in said] == [((), ("data",))]
    bench.after(61)
    said = [each for each in bench.done() if isinstance(each, core.PublishStatus)]
    assert [each.datasets for each in said] == [("points",)]


def test_words_of_an_earlier_job_do_not_count() -> None:
    """What a stopped trainer still said is ignored."""
    bench = Bench()
    bench.begin()
    assert bench.tell(core.TrainerTold(Progress("another", "training"))) == []
    assert bench.tell(core.TrainerTold(Failed("another", "graph", ""))) == []
    assert bench.machine.work is not None


def test_progress_is_told_now_and_then() -> None:
    """A line in ten seconds, not one for each step."""
    bench = Bench()
    bench.begin()
    assert bench.machine.work is not None
    told = []
    for step in range(25):
        bench.now = later(1.0, bench.now)
        told += bench.tell(core.TrainerTold(Progress(bench.machine.work.id, "training", step=step)))
    assert [each.progress.step for each in told if isinstance(each, core.ShowProgress)] == [9, 19]
    assert bench.machine.progress == Progress(bench.machine.work.id, "training", step=24)


def test_a_warm_trainer_rests_after_a_while() -> None:
    """It stays for the next round, then its memory is freed."""
    bench = Bench()
    bench.begin()
    bench.done()
    assert "RestTrainer" not in kinds(bench.after(119))
    assert kinds(bench.after(2)).count("RestTrainer") == 1


# -- what it says ------------------------------------------------------------------------------------------------


def test_a_receipt_settles_the_update() -> None:
    """Once, by the aggregator's signature, for this device only."""
    bench = Bench()
    bench.begin()
    (send,) = [each for each in bench.done() if isinstance(each, delivery.SendUpdate)]

    def receipt(device: str = "sensor-1") -> core.ReceiptArrived:
        record = Receipt(1, send.update.digest, "points", 1, device, Outcome.ACCEPTED, "")
        return core.ReceiptArrived(signing.sign(record, Role.AGGREGATOR, RECORDS.aggregator))

    assert bench.refused(receipt("sensor-2")) is Reason.WRONG_DEVICE
    forged = signing.sign(
        Receipt(1, send.update.digest, "points", 1, "sensor-1", Outcome.ACCEPTED, ""),
        Role.AGGREGATOR,
        RECORDS.publisher,
    )
    assert bench.refused(core.ReceiptArrived(forged)) is Reason.UNKNOWN_KEY
    assert kinds(bench.tell(receipt())) == ["Settled"]
    assert bench.tell(receipt()) == []


def test_what_nobody_answered_is_sent_again() -> None:
    """When an aggregator says that it is there: the identical head, a little later, until it is answered."""
    bench = Bench()
    bench.begin()
    (send,) = [each for each in bench.done() if isinstance(each, delivery.SendUpdate)]
    assert kinds(bench.tell(core.AggregatorSaid(False))) == []
    assert "SendUpdate" not in kinds(bench.tell(core.AggregatorSaid(True)))
    again = [each for each in bench.after(delivery.RESEND_SPREAD) if isinstance(each, delivery.SendUpdate)]
    assert [each.update for each in again] == [send.update]
    record = Receipt(1, send.update.digest, "points", 1, "sensor-1", Outcome.ACCEPTED, "")
    bench.tell(core.ReceiptArrived(signing.sign(record, Role.AGGREGATOR, RECORDS.aggregator)))
    bench.tell(core.AggregatorSaid(True))
    assert "SendUpdate" not in kinds(bench.after(delivery.RESEND_SPREAD))


def test_what_nobody_answered_is_dropped_with_its_round() -> None:
    """A newer round means that it can count no more."""
    bench = Bench()
    bench.begin()
    (send,) = [each for each in bench.done() if isinstance(each, delivery.SendUpdate)]
    dropped = [each.update for each in bench.offer(number=2) if isinstance(each, delivery.DropUpdate)]
    assert dropped == [send.update]
    bench.tell(core.AggregatorSaid(True))
    assert "SendUpdate" not in kinds(bench.after(delivery.RESEND_SPREAD))


def test_a_damaged_release_is_taken_again_and_an_older_one_is_not() -> None:
    """The position outlives the files."""
    bench = Bench()
    bench.tell(core.Connected(), Tick())
    position = Position((1, 3), signing.digest(RECORDS.message(number=3).release))
    bench.machine.tasks["points"] = core.Task("points", release_position=position)
    assert bench.refused(core.ReleaseArrived("points", RECORDS.message(number=2))) is Reason.ROLLBACK
    assert kinds(bench.tell(core.ReleaseArrived("points", RECORDS.message(number=3)))) == ["KeepRelease", "UseRelease"]


def test_one_failure_does_not_cost_the_next_round() -> None:
    """But a device that fails in every round does not start a trainer for each."""
    bench = Bench()
    bench.begin()
    bench.tell(core.TrainerGone("killed", "signal 9"))
    assert "Train" in kinds(bench.offer(number=2))
    bench.tell(core.TrainerGone("killed", "signal 9"))
    assert "Train" not in kinds(bench.offer(number=3))
    assert "Train" in kinds(bench.after(120))


def test_birth_and_change_are_told() -> None:
    """On connect, and when eligibility changes, not otherwise."""
    bench = Bench()
    assert "PublishStatus" in kinds(bench.tell(core.Connected(), Tick()))
    assert "PublishStatus" not in kinds(bench.after(3600))
    bench.facts = changed(FACTS, mains=False)
    said = [each for each in bench.after(31) if isinstance(each, core.PublishStatus)]
    assert [(each.eligible, each.obstacles) for each in said] == [(False, ("mains",))]


def test_a_device_that_flaps_is_held_back() -> None:
    """Three words at once, then one in five minutes; the last state is told in the end."""
    bench = Bench()
    bench.tell(core.Connected(), Tick())
    said = []
    for turn in range(20):
        bench.facts = changed(FACTS, mains=bool(turn % 2))
        said += [each for each in bench.after(31) if isinstance(each, core.PublishStatus)]
    assert 2 <= len(said) <= 2 + 620 // 300
    said += [each for each in bench.after(300) if isinstance(each, core.PublishStatus)]
    assert said[-1].eligible == bench.machine.eligible


def test_a_birth_is_never_held_back() -> None:
    """A device that flapped and reconnects would otherwise count as gone for minutes, and no round would open."""
    bench = Bench()
    bench.tell(core.Connected(), Tick())
    for turn in range(20):
        bench.facts = changed(FACTS, mains=bool(turn % 2))
        bench.after(31)
    bench.tell(core.Disconnected())
    assert "PublishStatus" in kinds(bench.tell(core.Connected()))


def test_the_status_is_said_again_before_it_ages() -> None:
    """The aggregator forgets what it has not heard for 13 hours."""
    bench = Bench()
    bench.tell(core.Connected(), Tick())
    said = [each for each in bench.after(24 * 3600) if isinstance(each, core.PublishStatus)]
    assert 4 <= len(said) <= 6


def test_the_status_is_said_again_when_the_clock_was_set() -> None:
    """A board that booted in the past said so with its birth, and such an old word counts for nothing."""
    bench = Bench()
    bench.tell(core.Connected(), Tick())
    assert kinds(bench.tell(core.ClockSet())) == ["PublishStatus"]


def test_records_are_asked_for_again_when_the_clock_was_set() -> None:
    """What a clock that was ahead refused as expired lies on the broker and would not come again by itself."""
    bench = Bench()
    bench.tell(core.Connected(), Tick())
    bench.tell(core.ClockSet())
    assert "AskRecords" in kinds(bench.after(core.CLOCK_SETTLES))
    assert "AskRecords" not in kinds(bench.after(core.CLOCK_SETTLES))
    bench.tell(core.ClockSet(), core.Disconnected())
    assert "AskRecords" not in kinds(bench.after(core.CLOCK_SETTLES))
    bench.tell(core.Connected())
    assert "AskRecords" in kinds(bench.after(core.CLOCK_SETTLES))


def test_mended_data_are_offered_again_without_a_training() -> None:
    """While the aggregator waits for this very device no round opens in which it could prove them good."""
    bench = Bench()
    bench.begin()
    assert bench.machine.work is not None
    bench.tell(core.TrainerTold(Failed(bench.machine.work.id, "data", "x.npz: row 3: NaN")))
    bench.offer(sequence=1, state=OfferState.CLOSED)
    said = [each for each in bench.after(6 * 3600) if isinstance(each, core.PublishStatus)]
    assert [each.datasets for each in said] == [("points",)]


def test_nothing_is_said_while_the_broker_is_away() -> None:
    """And everything when it is back."""
    bench = Bench()
    bench.tell(core.Connected(), Tick(), core.Disconnected())
    bench.facts = changed(FACTS, mains=False)
    assert "PublishStatus" not in kinds(bench.after(3600))
    assert "PublishStatus" in kinds(bench.tell(core.Connected()))


# -- weights in chunks, and bodies in chunks ---------------------------------------------------------------------

BLOB = RECORDS.message(number=1, value=3.0).weights or b""
REF = chunks.describe(BLOB, 64)
NAME = REF.sha256


def in_chunks(number: int = 1, blob: BlobRef = REF, **changes: Any) -> ReleaseMessage:
    """A release whose weights do not travel with it."""
    signed = RECORDS.sign_manifest(RECORDS.manifest(**changes))
    return ReleaseMessage(2, signed, RECORDS.release(signed, number, v=2, weights=blob), MESSAGE.graphs, None)


def fetch(bench: Bench) -> list[Effect]:
    """The disk is empty, the broker sends every chunk, the disk takes them."""
    bench.tell(download.SpoolRead("points", NAME, tuple(range(len(REF.chunks)))))
    for index in range(len(REF.chunks)):
        start, end = chunks.span(len(BLOB), 64, index)
        bench.tell(download.ChunkArrived(NAME, index, BLOB[start:end]))
    return bench.tell(download.Whole("points", NAME))


def test_a_release_in_chunks_is_accepted_when_whole() -> None:
    """Verified at once, kept only when the last chunk lies on the disk; its offer waits until then."""
    bench = Bench()
    bench.begin()
    message = in_chunks()
    assert kinds(bench.tell(core.ReleaseArrived("points", message))) == ["OpenSpool", "PublishStatus"]
    assert "Train" not in kinds(bench.offer(message, number=2))
    assert bench.machine.tasks["points"].release_position == Position((1, 0), signing.digest(MESSAGE.release))
    assert kinds(bench.tell(core.ReleaseArrived("points", message))) == []
    assert kinds(fetch(bench)) == ["KeepRelease", "UseRelease", "KeepJob", "Train"]
    assert bench.tell(core.ReleaseArrived("points", message)) == []


def test_a_first_release_in_chunks() -> None:
    """A task that was never heard of, its offer before it."""
    bench = Bench()
    bench.tell(core.Connected(), Tick())
    message = in_chunks(0)
    message = structs.replace(message, release=RECORDS.release(message.manifest, 0, v=2, weights=REF))
    bench.offer(message)
    bench.tell(core.ReleaseArrived("points", message))
    assert bench.machine.tasks == {}
    assert kinds(fetch(bench))[:5] == ["KeepRelease", "UseRelease", "KeepOffer", "KeepJob", "Train"]


def test_releases_in_chunks_that_are_refused() -> None:
    """Signature, order and graphs are checked before a byte is fetched, and so is what the weights can be."""
    bench = Bench()
    bench.begin(RECORDS.message(number=3))
    assert bench.refused(core.ReleaseArrived("points", in_chunks(2))) is Reason.ROLLBACK
    forged = structs.replace(in_chunks(4), release=structs.replace(in_chunks(4).release, sig=bytes(64)))
    assert bench.refused(core.ReleaseArrived("points", forged)) is Reason.BAD_SIGNATURE
    assert MESSAGE.graphs is not None
    other = structs.replace(MESSAGE.graphs, train=MESSAGE.graphs.eval)
    swapped = structs.replace(in_chunks(4), graphs=other)
    assert bench.refused(core.ReleaseArrived("points", swapped)) is Reason.WRONG_DIGEST
    most = weights_max(RECORDS.manifest().layout)
    huge = BlobRef(bytes(32), most + 1, most, [bytes(32)] * 2)
    assert bench.refused(core.ReleaseArrived("points", in_chunks(4, huge))) is Reason.TOO_LARGE
    bench.tell(core.ReleaseArrived("points", in_chunks(5)))
    assert bench.refused(core.ReleaseArrived("points", in_chunks(4))) is Reason.ROLLBACK


def test_whole_releases_overtake_what_is_coming() -> None:
    """A newer one ends the download, an older one does not."""
    bench = Bench()
    bench.begin()
    bench.tell(core.ReleaseArrived("points", in_chunks(5)))
    assert kinds(bench.tell(core.ReleaseArrived("points", RECORDS.message(number=4)))) == ["KeepRelease", "UseRelease"]
    assert bench.machine.downloads.get("points") is not None
    bench.tell(core.ReleaseArrived("points", RECORDS.message(number=6)))
    assert bench.machine.downloads.get("points") is None
    assert kinds(bench.tell(download.Whole("points", NAME))) == []


def test_what_is_coming_counts_as_a_task() -> None:
    """Names on topics cost no memory without end, whether or not their weights ever come."""
    bench = Bench()
    for number in range(core.TASKS_MAX):
        bench.machine.tasks[f"task-{number}"] = core.Task(f"task-{number}", manifest=RECORDS.manifest())
    assert bench.refused(core.ReleaseArrived("points", in_chunks())) is Reason.TOO_LARGE
    del bench.machine.tasks["task-7"]
    bench.tell(core.ReleaseArrived("points", in_chunks()))
    other = RECORDS.sign_manifest(RECORDS.manifest(task="other"))
    message = structs.replace(MESSAGE, manifest=other, release=RECORDS.release(other, task="other"))
    assert bench.refused(core.ReleaseArrived("other", message)) is Reason.TOO_LARGE


def test_it_says_that_it_understands_protocol_2_once_it_has_met_it() -> None:
    """By a manifest, or by a release that is only coming; an older aggregator is never told what it cannot read."""

    def said(effects: list[Effect]) -> list[int]:
        statuses = [each for each in effects if isinstance(each, core.PublishStatus)]
        return [core.status(each, bytes(8), NOW.utc).v for each in statuses]

    bench = Bench()
    assert said(bench.tell(core.Connected(), Tick())) == [1]
    assert said(bench.tell(core.ReleaseArrived("points", MESSAGE))) == []
    assert said(bench.tell(core.ReleaseArrived("points", in_chunks()))) == [2]
    gated = Bench()
    gated.tell(core.Connected(), Tick())
    message = RECORDS.message(RECORDS.manifest(until=0.9))
    assert said(gated.tell(core.ReleaseArrived("points", message))) == [2]
    again = Bench()
    again.machine.restore([gated.machine.tasks["points"]], [], NOW)
    assert said(again.tell(core.Connected(), Tick())) == [2]


def sealed(bench: Bench, size: int) -> delivery.Update:
    """The trainer has finished with a body of so many bytes."""
    assert bench.machine.work is not None
    result = Done(bench.machine.work.id, bytes(80), size, bytes(32), 40, 10, 10, {}, 0.5, 1.0, 1.0, 1.0, 1)
    (kept,) = [each for each in bench.tell(core.TrainerTold(result)) if isinstance(each, delivery.KeepUpdate)]
    return kept.update


@pytest.mark.parametrize(
    ("size", "packet_max", "chunk_size"),
    [
        (chunks.INLINE_MAX, None, 0),
        (chunks.INLINE_MAX + 1, None, chunks.CHUNK_SIZE),
        (chunks.INLINE_MAX, 65_536, 65_536 - chunks.PACKET_ROOM),
        (1 << 30, 131_072, chunks.CHUNK_SIZE),
        (100, 65_536, 0),
    ],
)
def test_a_large_body_goes_in_chunks(size: int, packet_max: int | None, chunk_size: int) -> None:
    """Which the signed head fixes; a small one rides along, if the broker takes it."""
    bench = Bench()
    bench.begin()
    bench.tell(core.Connected(packet_max))
    update = sealed(bench, size)
    head = wire.unpack(update.head, UpdateHead)
    assert (head.v, head.chunk_size, head.size) == (2 if chunk_size else 1, chunk_size, size)
    assert (update.chunk_size, update.size) == (chunk_size, size)


def test_chunks_are_sent_when_asked_for_and_a_receipt_ends_it() -> None:
    """The broker's acknowledgement only makes room; a receipt is the truth."""
    bench = Bench()
    bench.begin()
    update = sealed(bench, 1 << 20)
    assert bench.refused(core.MissingArrived(Missing(2, bytes(32), [0]))) is Reason.UNASKED
    sent = bench.tell(core.MissingArrived(Missing(2, update.digest, [2, 5])))
    assert [each.index for each in sent if isinstance(each, delivery.SendChunk)] == [2, 5]
    assert bench.tell(core.ChunkTaken(update.digest, 2, True), core.ChunkTaken(update.digest, 5, True)) == []
    record = Receipt(1, update.digest, "points", 1, "sensor-1", Outcome.ACCEPTED, "")
    assert kinds(bench.tell(core.ReceiptArrived(signing.sign(record, Role.AGGREGATOR, RECORDS.aggregator)))) == [
        "Settled"
    ]
    assert bench.refused(core.MissingArrived(Missing(2, update.digest, [2]))) is Reason.UNASKED


def restarted(bench: Bench, *updates: delivery.Update, settled: tuple[int, int] = (0, 0)) -> Bench:
    """The same device as a new process, with what lay on the disk."""
    task = bench.machine.tasks["points"]
    known = core.Task(
        "points",
        task.manifest_signed,
        task.manifest,
        task.release,
        task.manifest_position,
        task.release_position,
        task.offer_position,
        settled=settled,
    )
    again = Bench(now=bench.now)
    again.effects += again.machine.restore([known], updates, again.now)
    again.tell(core.Connected(), Tick())
    return again


def test_an_update_survives_a_restart() -> None:
    """It is sent again with the same head, and its round is not trained a second time."""
    bench = Bench()
    bench.begin()
    update = sealed(bench, 100)
    again = restarted(bench, update)
    assert "Train" not in kinds(again.offer())
    sent = [each.update for each in again.after(delivery.RESEND_SPREAD) if isinstance(each, delivery.SendUpdate)]
    assert sent == [update]
    assert "Train" in kinds(again.offer(number=2))


def test_without_an_outbox_the_round_is_trained_again() -> None:
    """What was damaged on the disk is made once more."""
    bench = Bench()
    bench.begin()
    sealed(bench, 100)
    assert "Train" in kinds(restarted(bench).offer())


def test_an_update_that_was_answered_is_not_sent_after_a_restart() -> None:
    """The power went between the receipt and the deletion of the files."""
    bench = Bench()
    bench.begin()
    update = sealed(bench, 100)
    again = restarted(bench, update, settled=update.position)
    assert kinds(again.effects)[0] == "DropUpdate"
    assert "SendUpdate" not in kinds(again.after(delivery.RESEND_MAX))
    assert "Train" not in kinds(again.offer())


def test_an_update_of_a_task_whose_state_was_lost() -> None:
    """It still waits, and once the release is back its round is not trained a second time."""
    bench = Bench()
    bench.begin()
    update = sealed(bench, 100)
    again = Bench()
    again.machine.restore([], [update], NOW)
    assert "Train" not in kinds(again.begin())
    assert "SendUpdate" in kinds(again.after(delivery.RESEND_SPREAD))


def test_a_body_that_is_lost_is_made_again() -> None:
    """After a minute, and not at once for ever."""
    bench = Bench()
    bench.begin()
    update = sealed(bench, 100)
    assert kinds(bench.tell(core.UpdateLost(update.digest, "gone"))) == ["DropUpdate"]
    assert "Train" not in kinds(bench.after(core.RETRY_FIRST - 1))
    assert "Train" in kinds(bench.after(2))


def test_an_expired_manifest_holds_its_updates_back() -> None:
    """By the device's time; what a clock that jumped has held back goes out when it is right again."""
    bench = Bench()
    bench.begin()
    bench.machine.delivery.disconnected()
    update = sealed(bench, 100)
    bench.now = Instant(bench.now.mono, bench.now.utc + 10**6)
    bench.tell(Tick(), core.Connected())
    assert "SendUpdate" not in kinds(bench.after(600))
    bench.now = Instant(bench.now.mono, bench.now.utc - 10**6)
    bench.tell(Tick())
    sent = [each.update for each in bench.after(60) if isinstance(each, delivery.SendUpdate)]
    assert sent[0] == update


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["offer", "close", "release", "done", "fail", "unplug", "plug", "wait", "up", "down"]),
            st.integers(1, 4),
        ),
        max_size=30,
    )
)
def test_whatever_happens(steps: list[tuple[str, int]]) -> None:
    """One job at a time, each round sent at most once, positions never fall, no wake-up without an end."""
    bench = Bench()
    bench.tell(core.Connected(), Tick(), core.ReleaseArrived("points", MESSAGE))
    newest = MESSAGE
    for what, number in steps:
        try:
            match what:
                case "offer":
                    bench.offer(newest, number=number)
                case "close":
                    bench.offer(newest, number=number, sequence=1, state=OfferState.CLOSED)
                case "release":
                    message = RECORDS.message(number=number)
                    bench.tell(core.ReleaseArrived("points", message))
                    newest = message
                case "done" if bench.machine.work is not None:
                    bench.done()
                case "fail":
                    bench.tell(core.TrainerGone("killed", "signal 9"))
                case "plug" | "unplug":
                    bench.facts = changed(FACTS, mains=what == "plug")
                case "wait":
                    bench.after(10.0**number)
                case "up":
                    bench.tell(core.Connected())
                case "down":
                    bench.tell(core.Disconnected())
        except RemoteProtocolError:
            pass
    sent = [each.round for each in bench.effects if isinstance(each, core.TrainingFinished)]
    assert sent == sorted(set(sent))
    ends = (core.TrainingFinished, core.TrainingFailed, core.StopTraining)
    turns = [each for each in bench.effects if isinstance(each, (core.Train, *ends))]
    for before, after in pairwise(turns):
        assert not (isinstance(before, core.Train) and isinstance(after, core.Train))
    ranks = [each.position.rank for each in bench.effects if isinstance(each, core.KeepOffer)]
    assert ranks == sorted(ranks)


def changed(value: Any, **changes: Any) -> Any:
    """A frozen struct or dataclass with other fields."""
    if isinstance(value, DeviceFacts):
        return dataclasses.replace(value, **changes)
    return structs.replace(value, **changes)


# -- the model in use ----------------------------------------------------------------------------------------------


def judging(bench: Bench, message: ReleaseMessage) -> list[core.JudgeRelease]:
    """A release arrives at a device whose owner has releases judged."""
    effects = bench.tell(core.ReleaseArrived("points", message))
    assert "UseRelease" not in kinds(effects)
    return [each for each in effects if isinstance(each, core.JudgeRelease)]


def judge() -> Bench:
    """A free device that has releases judged, with its first one in use."""
    bench = Bench()
    bench.machine = dataclasses.replace(bench.machine, quality=Quality(refuse=True, drop=0.05, examples=20))
    bench.tell(core.Connected(), Tick())
    assert "UseRelease" in kinds(bench.tell(core.ReleaseArrived("points", MESSAGE)))  # better than none
    return bench


def said(id: str, now: float | None, before: float | None, examples: int = 50) -> core.TrainerTold:
    """What the trainer found, by the task's metric."""
    metrics = [{} if value is None else {"loss": value} for value in (now, before)]
    return core.TrainerTold(Judged(id, examples, metrics[0], metrics[1]))


def test_every_release_is_in_use_at_once() -> None:
    """Unless the owner wants it judged, also after a restart in between."""
    bench = Bench()
    bench.tell(core.Connected(), Tick())
    (used,) = [e for e in bench.tell(core.ReleaseArrived("points", MESSAGE)) if isinstance(e, core.UseRelease)]
    task = bench.machine.tasks["points"]
    assert task.release_position is not None
    assert (used.digest, used.judged) == (task.release_position.digest, None)
    assert Bench().machine.restore([replace(task)], [], NOW, used={"points": used.digest}) == []
    assert kinds(Bench().machine.restore([replace(task)], [], NOW, used={"points": bytes(32)})) == ["UseRelease"]


def test_a_disk_that_refuses_the_model() -> None:
    """It is asked again until it takes the model, or until a newer release has its turn."""
    bench = Bench()
    bench.tell(core.Connected(), Tick())
    (used,) = [e for e in bench.tell(core.ReleaseArrived("points", MESSAGE)) if isinstance(e, core.UseRelease)]
    for _ in range(2):
        assert bench.tell(core.ShelfFailed(used)) == []
        assert "UseRelease" not in kinds(bench.after(core.SHELF_RETRY - 1))
        assert [each for each in bench.after(2) if isinstance(each, core.UseRelease)] == [used]
    assert "UseRelease" not in kinds(bench.after(10 * core.SHELF_RETRY))
    bench.tell(core.ShelfFailed(used))
    assert "UseRelease" in kinds(bench.tell(core.ReleaseArrived("points", RECORDS.message(number=1))))
    bench.tell(core.ShelfFailed(used))
    assert "UseRelease" not in kinds(bench.after(10 * core.SHELF_RETRY))


def test_a_release_is_judged() -> None:
    """One that is not clearly worse is taken into use with its metrics; one that is is refused, and that told."""
    bench = judge()
    (first,) = judging(bench, RECORDS.message(number=1))
    effects = bench.tell(said(first.id, 1.2, 1.0))
    (used,) = [each for each in effects if isinstance(each, core.UseRelease)]
    assert used.release.number == 1 and used.judged is not None and used.judged.metrics == {"loss": 1.2}
    (second,) = judging(bench, RECORDS.message(number=2))
    effects = bench.tell(said(second.id, 1.6, 1.2))
    (refused,) = [each for each in effects if isinstance(each, core.RefuseRelease)]
    assert refused.release == 2 and "loss 1.6 on 50 local examples, 1.2 of the one in use" in refused.why
    assert "JudgeRelease" not in kinds(bench.after(1000))
    assert "JudgeRelease" in kinds(bench.tell(core.ReleaseArrived("points", RECORDS.message(number=3))))


def fails(bench: Bench, asked: core.JudgeRelease, how: str) -> list[Effect]:
    """The trainer cannot judge."""
    if how == "failed":
        return bench.tell(core.TrainerTold(Failed(asked.id, "data", "none")))
    if how == "gone":
        return bench.tell(core.TrainerGone("killed", "signal 9"))
    return bench.after(601)


@pytest.mark.parametrize(("how", "why"), [("failed", "data: none"), ("gone", "trainer_killed"), ("slow", "600 s")])
def test_what_cannot_be_judged_is_not_used(how: str, why: str) -> None:
    """A trainer that fails, dies or takes for ever is tried again now and then, and in the end that is told."""
    bench = judge()
    found = judging(bench, RECORDS.message(number=1))
    for wait in (core.RETRY_FIRST, 2 * core.RETRY_FIRST):
        (asked,) = found
        effects = fails(bench, asked, how)
        assert ("StopJudging" in kinds(effects)) is (how == "slow")
        assert bench.machine.judging is None and not {"UseRelease", "RefuseRelease"} & set(kinds(effects))
        assert "JudgeRelease" not in kinds(bench.after(wait - 5))
        found = [each for each in bench.after(6) if isinstance(each, core.JudgeRelease)]
    (refused,) = [each for each in fails(bench, found[0], how) if isinstance(each, core.RefuseRelease)]
    assert refused.release == 1 and why in refused.why
    assert not {"UseRelease", "JudgeRelease"} & set(kinds(bench.after(10 * core.RETRY_MAX)))
    (next_one,) = judging(bench, RECORDS.message(number=2))
    assert "UseRelease" in kinds(bench.tell(said(next_one.id, 1.0, 1.0)))


def test_judged_at_last() -> None:
    """A trainer that failed and then can judge has its word count."""
    bench = judge()
    (asked,) = judging(bench, RECORDS.message(number=1))
    fails(bench, asked, "gone")
    (asked,) = [each for each in bench.after(core.RETRY_FIRST + 1) if isinstance(each, core.JudgeRelease)]
    assert "UseRelease" in kinds(bench.tell(said(asked.id, 1.0, 1.0)))


def test_judging_waits_for_a_free_device() -> None:
    """It is work like training: not begun on battery, given up when the plug is pulled, and begun again later."""
    bench = judge()
    bench.facts = changed(FACTS, mains=False)
    bench.after(31)
    assert judging(bench, RECORDS.message(number=1)) == []
    bench.facts = FACTS
    assert "JudgeRelease" in kinds(bench.after(31))
    bench.facts = changed(FACTS, mains=False)
    effects = bench.after(31)
    assert "StopJudging" in kinds(effects) and "UseRelease" not in kinds(effects)
    bench.facts = FACTS
    effects = bench.after(31)
    (asked,) = [each for each in effects if isinstance(each, core.JudgeRelease)]
    bench.offer(RECORDS.message(number=1))
    assert bench.machine.work is None  # one thing at a time
    assert "Train" in kinds(bench.tell(said(asked.id, 1.0, 1.0)))


def test_judging_is_our_own_load() -> None:
    """While the trainer judges, the device is looked at as often as in training, and its own load is told apart."""
    bench = judge()
    (asked,) = judging(bench, RECORDS.message(number=1))
    assert [each.working for each in bench.effects if isinstance(each, core.Sense)][-1] is True
    assert bench.machine.deadline is not None
    assert bench.machine.deadline <= bench.now.mono + POLICY.sense_training
    bench.tell(said(asked.id, 1.0, 1.0))
    bench.after(6)
    assert [each.working for each in bench.effects if isinstance(each, core.Sense)][-1] is False


def test_a_newer_release_while_one_is_judged() -> None:
    """The older one is of no interest any more."""
    bench = judge()
    (first,) = judging(bench, RECORDS.message(number=1))
    effects = bench.tell(core.ReleaseArrived("points", RECORDS.message(number=2)))
    (second,) = [each for each in effects if isinstance(each, core.JudgeRelease)]
    assert [each.id for each in effects if isinstance(each, core.StopJudging)] == [first.id]
    assert bench.tell(said(first.id, 9.0, 1.0)) == []
    assert "UseRelease" in kinds(bench.tell(said(second.id, 1.0, 1.0)))


def test_the_daemon_ends_while_it_judges() -> None:
    """Nothing is lost by that."""
    bench = judge()
    judging(bench, RECORDS.message(number=1))
    assert kinds(bench.tell(core.Leave())) == ["StopJudging", "Left"]
