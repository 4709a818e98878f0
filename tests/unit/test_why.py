"""edge_agent.why: each reason not to train is named, with what to do and how long it lasts."""

from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from edge_agent import download
from edge_agent import participation as core
from edge_agent.eligibility import Constraint, Policy
from edge_agent.jobs import Failed, Progress
from edge_agent.why import why
from shared.messages import Conditions, OfferState
from shared.opset import OPSET_VERSION
from tests.records import later
from tests.unit.test_participation import FACTS, MESSAGE, POLICY, RECORDS, Bench, in_chunks

KEYS = {"name", "verdict", "value", "threshold", "text", "setting", "source", "advice"}


def asked(bench: Bench, only: str | None = None, link: str = "") -> dict[str, Any]:
    """The answer now."""
    found: dict[str, Any] = why(bench.machine, link, bench.now, only)
    return found


def names(found: dict[str, Any], task: str | None = None) -> list[str]:
    """The reasons that it gives, the constraints apart."""
    return [each["name"] for each in (found if task is None else found["tasks"][task])["reasons"]]


def with_policy(policy: Policy) -> Bench:
    """A device whose owner asks for this."""
    bench = Bench()
    machine = bench.machine
    bench.machine = core.Participation(
        machine.trust, policy, "sensor-1", b"c", frozenset({"points"}), machine.random, 600.0, 120.0
    )
    return bench


def test_every_constraint_is_judged_with_its_setting_and_source() -> None:
    """All of them, in one order, met or not; of each task by its own conditions."""
    bench = Bench()
    bench.tell(core.Connected(), core.Wake(), core.ReleaseArrived("points", MESSAGE))
    found = asked(bench)
    for judged in (found["constraints"], found["tasks"]["points"]["constraints"]):
        assert [each["name"] for each in judged] == list(Constraint)
        assert all(set(each) == KEYS for each in judged)
        assert all(each["source"] and each["text"] for each in judged)


def test_a_constraint_that_is_not_met_is_the_answer() -> None:
    """In words, with the setting; once, also where a task asks for the same."""
    bench = Bench(facts=replace(FACTS, mains=False))
    bench.begin()
    found = asked(bench)
    assert found["answer"] == "this device does not train: on battery, and mains power is required (policy.mains)"
    (unmet,) = [each for each in found["constraints"] if each["verdict"] == "unmet"]
    assert unmet["name"] == "mains" and "policy.mains = false" in unmet["advice"]


def test_what_a_publisher_asks_for_is_told_of_its_task() -> None:
    """The device is ready, and this task still waits."""
    message = RECORDS.message(RECORDS.manifest(conditions=Conditions(mains=True)))
    bench = with_policy(Policy(settle=0.0, mains=False))
    bench.facts = replace(FACTS, mains=False)
    bench.begin(message)
    assert bench.machine.work is None
    answer = asked(bench)["answer"]
    assert answer.startswith("points is not trained: on battery") and "conditions.mains of the task" in answer
    assert asked(bench, "points")["answer"] == answer


def test_before_the_first_look_nothing_is_known() -> None:
    """It says so, instead of naming what it has not measured."""
    found = asked(Bench())
    assert names(found) == ["not_looked", "no_task"] and found["constraints"] == []


def test_settling_has_its_seconds() -> None:
    """What is over has to stay over for a while."""
    bench = with_policy(Policy(settle=60.0))
    bench.tell(core.Connected(), core.Wake())
    bench.now = later(20.0, bench.now)
    (settling, _) = asked(bench)["reasons"]
    assert settling["name"] == "settling" and settling["seconds"] == pytest.approx(40.0)


def test_without_a_broker_its_absence_is_named() -> None:
    """And that no offer is known is told with a grain of salt."""
    bench = Bench()
    bench.tell(core.Connected(), core.Wake(), core.ReleaseArrived("points", MESSAGE), core.Disconnected())
    found = asked(bench, link="connection refused")
    assert names(found) == ["link"] and "connection refused" in found["answer"]
    assert "as far as" in found["tasks"]["points"]["reasons"][0]["text"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"state": OfferState.CLOSED}, "round_closed"),
        ({"state": OfferState.FINISHED}, "round_closed"),
        ({"participation": 0}, "not_selected"),
    ],
)
def test_an_offer_that_is_not_for_this_device(changes: dict[str, Any], reason: str) -> None:
    """Closed, or drawn by lot without it; the machine's own word."""
    bench = Bench()
    bench.begin(**changes)
    assert bench.machine.work is None
    assert names(asked(bench), "points") == [reason]


def test_the_reasons_of_a_task() -> None:
    """No round, no data set, not known at all."""
    bench = Bench()
    bench.tell(core.Connected(), core.Wake(), core.ReleaseArrived("points", MESSAGE))
    assert names(asked(bench), "points") == ["no_offer"]
    assert asked(bench)["answer"] == "points is not trained: no round is open"
    assert names(asked(bench, "pionts"), "pionts") == ["unknown"]
    bench.machine.datasets = frozenset()
    (reason,) = asked(bench)["tasks"]["points"]["reasons"]
    assert reason["name"] == "no_data" and "[data.points]" in reason["advice"]


def test_a_round_without_a_release() -> None:
    """The offer came first."""
    bench = Bench()
    bench.tell(core.Connected(), core.Wake())
    bench.offer()
    assert names(asked(bench), "points") == ["no_release"]


def test_weights_on_their_way() -> None:
    """Of a release that comes in chunks, with how much is here; and when it is tried again after a failure."""
    bench = Bench()
    bench.tell(core.Connected(), core.Wake(), core.ReleaseArrived("points", in_chunks()))
    assert names(asked(bench), "points")[:1] == ["release_coming"]
    blob = bench.machine.downloads.get("points")
    assert blob is not None
    bench.tell(download.SpoolFailed("points", blob.release.weights.sha256, "full"))
    (reason, *_) = asked(bench)["tasks"]["points"]["reasons"]
    assert reason["name"] == "release_failed" and reason["seconds"] > 0


def test_a_start_that_is_spread_has_its_seconds() -> None:
    """So that the devices of a round do not begin together."""
    plan = RECORDS.manifest().plan
    message = RECORDS.message(RECORDS.manifest(plan=structs.replace(plan, start_jitter=600)))
    bench = Bench()
    bench.begin(message)
    (reason,) = asked(bench)["tasks"]["points"]["reasons"]
    assert reason["name"] == "start_jitter" and 0 < reason["seconds"] <= 600


def test_work_and_what_interrupts_it() -> None:
    """Training, then frozen with the seconds that are left, then a failure with its retry, then done."""
    bench = Bench()
    bench.begin()
    work = bench.machine.work
    assert work is not None
    bench.tell(core.TrainerTold(Progress(work.id, "training", 1, 2, 7, 4, 0.5)))
    found = asked(bench)
    assert found["training"] and found["answer"] == "it is training: points, round 1, epoch 1, step 7"
    bench.facts = replace(FACTS, mains=False)
    bench.tell(core.Wake())
    found = asked(bench)
    assert not found["training"]
    assert "stands still, and its memory is given back in 300 s: on battery" in found["answer"]
    bench.facts = FACTS
    bench.tell(core.Wake())
    bench.tell(core.TrainerTold(Failed(work.id, "data", "row 3")))
    found = asked(bench)
    (reason,) = found["tasks"]["points"]["reasons"]
    assert reason["name"] == "retry" and reason["seconds"] == core.RETRY_FIRST
    (data,) = [each for each in found["tasks"]["points"]["constraints"] if each["name"] == "data"]
    assert data["verdict"] == "unmet" and "row 3" in data["text"]
    bench.after(core.RETRY_FIRST + 1)
    bench.done()
    assert names(asked(bench), "points") == ["worked"]


def test_work_that_was_left_is_told() -> None:
    """It goes on later."""
    bench = Bench()
    bench.begin()
    work = bench.machine.work
    assert work is not None
    bench.tell(core.TrainerTold(Progress(work.id, "training", 1, 2, 7, 4, 0.5)))
    bench.facts = replace(FACTS, paused=True)
    bench.tell(core.Wake())
    assert "is about to be left" in asked(bench)["answer"]
    bench.tell(core.TrainerGone("exited", ""))
    assert names(asked(bench), "points") == ["left"]


def test_an_expired_task_is_told() -> None:
    """Whatever else there is."""
    bench = Bench()
    bench.tell(core.Connected(), core.Wake(), core.ReleaseArrived("points", MESSAGE))
    expires = RECORDS.manifest().expires
    bench.now = replace(bench.now, utc=expires + 1.0)
    assert names(asked(bench), "points") == ["expired", "no_offer"]


def test_the_machine_trains_exactly_what_nothing_holds() -> None:
    """`hold` is what decides, so the reasons cannot say otherwise."""
    bench = Bench()
    bench.begin()
    task = bench.machine.tasks["points"]
    assert bench.machine.work is not None and bench.machine.hold(task) is None
    assert task.manifest is not None and task.manifest.opset == OPSET_VERSION
    assert POLICY.settle == 0.0
