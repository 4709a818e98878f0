"""Why this device does not train: every constraint and every other reason, task by task, for its owner. Pure.

It says what the machine (edge_agent.participation) has decided, out of what that knows, and decides nothing itself.
The answer is plain values, so that it can travel as JSON; its keys are stable, its sentences are for people.
"""

from collections.abc import Collection, Mapping, Sequence

from edge_agent.eligibility import DeviceFacts, Judgement, Verdict, constraints
from edge_agent.participation import Hold, Participation, Task, Work
from shared.machine import Instant
from shared.messages import OfferState

Reason = dict[str, object]
"""name, text, advice, and seconds until it is over, or None where nobody knows."""

_SHOWN = 3
"""Reasons that fit into a sentence."""


def why(part: Participation, link: str, now: Instant, only: str | None = None) -> dict[str, object]:
    """The answer to "why am I not training?"; `link` is why the broker is not there, or "". `only`: one task."""
    facts = part.facts
    judged = () if facts is None else constraints(part.policy, None, facts)
    names = sorted({*part.tasks, *part.downloads.tasks, *part.awaited}) if only is None else [only]
    tasks = {name: _task(part, name, facts, link, now) for name in names}
    general = _general(part, link, now)
    return {
        "training": part.work is not None and part.work.state == "training",
        "answer": _answer(part, judged, general, tasks, only, now),
        "reasons": general,
        "constraints": [_constraint(each) for each in judged],
        "tasks": tasks,
    }


# -- the device ----------------------------------------------------------------------------------------------------


def _general(part: Participation, link: str, now: Instant) -> list[Reason]:
    """What stands in the way of every task, the constraints apart."""
    found = []
    if part.ending:
        found.append(_reason("ending", "the agent is about to end", "start it again"))
    if part.facts is None:
        found.append(_reason("not_looked", "the agent has only begun and has not looked at the device yet", "wait"))
    if part.settles_at is not None:
        left = max(0.0, part.settles_at - now.mono)
        text = f"nothing stands in the way any more, and that has to last for {left:.0f} s (policy.settle)"
        found.append(_reason("settling", text, "wait, or lower policy.settle", left))
    if part.judging is not None:
        text = f"the newest release of {part.judging.task} is judged on the local hold-out first ([local] refuse)"
        left = max(0.0, part.judging.deadline - now.mono)
        found.append(_reason("judging", text, "wait", left))
    if link:
        advice = "edge-agent doctor looks into it; a round that is open here already is trained all the same"
        found.append(_reason("link", f"the broker is not connected: {link}", advice))
    if not part.tasks and not part.downloads.tasks:
        advice = "wait until a model is published to the fleet, or ask its operator"
        found.append(_reason("no_task", "no task is known here: no release has come", advice))
    return found


def _constraint(found: Judgement) -> dict[str, object]:
    return {
        "name": found.name.value,
        "verdict": found.verdict.value,
        "value": found.value,
        "threshold": found.threshold,
        "text": found.text,
        "setting": found.setting,
        "source": found.source,
        "advice": found.advice,
    }


# -- a task --------------------------------------------------------------------------------------------------------


def _task(part: Participation, name: str, facts: DeviceFacts | None, link: str, now: Instant) -> dict[str, object]:
    """What stands in a task's way, beside what stands in everything's."""
    task = part.tasks.get(name)
    manifest = None if task is None else task.manifest
    judged: Sequence[Judgement] = ()
    if manifest is not None and facts is not None:
        judged = constraints(part.policy, manifest.conditions, facts, part.examples(manifest))
    reasons = _coming(part, name, now)
    if task is None:
        reasons += [] if reasons else [_unknown(part, name)]
    else:
        reasons += _of_task(part, task, bool(link), bool(reasons), now)
    unmet = [each for each in judged if each.verdict is Verdict.UNMET]
    work = part.work if part.work is not None and part.work.task == name else None
    if work is not None:
        answer = _working(part, work, now)
    elif texts := [str(each["text"]) for each in reasons] + [each.text for each in unmet]:
        answer = f"{name} is not trained: {_joined(texts)}"
    else:
        answer = f"{name} is trained as soon as the device is ready"
    return {"answer": answer, "reasons": reasons, "constraints": [_constraint(each) for each in judged]}


def _unknown(part: Participation, name: str) -> Reason:
    if name in part.awaited:
        return _reason("no_release", "a round is open, but no release has come that it could begin from", "wait")
    advice = "see edge-agent status for the tasks that are, and spell it like its publisher"
    return _reason("unknown", f"no task {name} is known here", advice)


def _coming(part: Participation, name: str, now: Instant) -> list[Reason]:
    """A release whose weights are on their way."""
    for task, number, until in part.downloads.coming:
        if task != name:
            continue
        if until is not None and until > now.mono:
            left = until - now.mono
            text = f"the weights of release {number} did not come, and are asked for again in {left:.0f} s"
            return [_reason("release_failed", text, "wait; the log's download.stopped says what went wrong", left)]
        text = f"release {number} is on its way"
        progress = part.downloads.progress
        if progress is not None and progress[0] == name:
            text += f" ({100 * progress[1] // max(1, progress[2])} %)"
        return [_reason("release_coming", text, "wait")]
    return []


def _of_task(part: Participation, task: Task, away: bool, coming: bool, now: Instant) -> list[Reason]:
    found = []
    manifest = task.manifest
    if manifest is not None and now.utc >= manifest.expires:
        advice = "its publisher has to publish a new version; the model in use here goes on answering"
        found.append(_reason("expired", f"version {manifest.version} of the task has expired", advice))
    hold = part.hold(task)
    if hold is not None and not (coming and hold is Hold.NO_RELEASE):
        found.append(_held(hold, task, away))
    if hold is None and task.start_at > now.mono:
        left = task.start_at - now.mono
        if task.failures:
            often = "" if task.failures == 1 else f" {task.failures} times in a row"
            text = f"training failed{often}, and is tried again in {left:.0f} s"
            advice = "the log's training.failed says what went wrong, edge-agent doctor looks for it"
            found.append(_reason("retry", text, advice, left))
        else:
            text = f"the devices of a round begin at different times, this one in {left:.0f} s"
            found.append(_reason("start_jitter", text, "wait", left))
    work = part.work
    if hold is None and work is not None and work.task != task.name:
        found.append(_reason("other_task", f"{work.task} is trained first, one task at a time", "wait"))
    if (left_job := part.left.get(task.name)) is not None:
        text = f"training for round {left_job.position[1]} was left in the middle, and goes on from there"
        found.append(_reason("left", text, "wait until the device is ready"))
    return found


_HELD: Mapping[Hold, tuple[str, str]] = {
    Hold.NO_RELEASE: ("no release has come yet", "wait"),
    Hold.NO_DATA: (
        "this device has no data set {dataset}",
        "say in agent.toml where it lies, path in [data.{dataset}], and restart edge-agent",
    ),
    Hold.OPSET: ("it needs operations that this agent does not know", "upgrade the agent"),
    Hold.NO_OFFER: ("no round is open{away}", "wait until the aggregator opens one"),
    Hold.CLOSED: ("round {round} is over{away}", "wait until the aggregator opens the next"),
    Hold.OTHER_RELEASE: ("round {round} begins from a release that is not here{away}", "wait until it comes"),
    Hold.WORKED: ("this device has done its part in round {round}", "wait for the next round"),
    Hold.NOT_SELECTED: ("round {round} was drawn by lot, and this device was not", "wait for the next round"),
}


def _held(hold: Hold, task: Task, away: bool) -> Reason:
    text, advice = _HELD[hold]
    offer, manifest = task.offer, task.manifest
    if hold is Hold.CLOSED and offer is not None and offer.state is OfferState.FINISHED:
        text, advice = "all rounds of the task are done", "its publisher may publish a new version"
    words = {
        "round": "" if offer is None else str(offer.round),
        "dataset": "" if manifest is None else manifest.data.dataset,
        "away": ", as far as a device without its broker can know" if away else "",
    }
    return _reason(hold.value, text.format(**words), advice.format(**words))


# -- sentences -----------------------------------------------------------------------------------------------------


def _answer(
    part: Participation,
    judged: Sequence[Judgement],
    general: Sequence[Reason],
    tasks: Mapping[str, Mapping[str, object]],
    only: str | None,
    now: Instant,
) -> str:
    """The whole in one sentence."""
    work = part.work
    if work is not None and only in (None, work.task):
        return _working(part, work, now)
    unmet = {each.name.value: each.text for each in judged if each.verdict is Verdict.UNMET}
    blocking = [str(each["text"]) for each in general if each["name"] not in ("link", "no_task")]
    if only is not None:
        task = tasks[only]
        texts = [*_texts(task), *([] if task["constraints"] else unmet.values()), *blocking]
        return f"{only} is not trained: {_joined(texts)}" if texts else str(task["answer"])
    texts = [*unmet.values(), *blocking, *(str(each["text"]) for each in general)]
    if not texts and len(tasks) == 1:
        return str(next(iter(tasks.values()))["answer"])
    texts += [f"{name}: {_joined(found)}" for name, each in tasks.items() if (found := _texts(each, unmet.keys()))]
    return f"this device does not train: {_joined(texts)}" if texts else "nothing stands in the way: training begins"


def _working(part: Participation, work: Work, now: Instant) -> str:
    where = f"{work.task}, round {work.round}"
    texts = _joined([each.text for each in part.obstacles]) or "the device has to stay free for a while"
    match work.state:
        case "training":
            step = "" if part.progress is None else f", epoch {part.progress.epoch}, step {part.progress.step}"
            return f"it is training: {where}{step}"
        case "frozen":
            left = 0.0 if work.leave_by is None else max(0.0, work.leave_by - now.mono)
            return f"training of {where} stands still, and its memory is given back in {left:.0f} s: {texts}"
        case _:
            return f"training of {where} is about to be left, to go on later: {texts}"


def _texts(task: Mapping[str, object], known: Collection[str] = ()) -> list[str]:
    """What stands in a task's way, the constraints in `known` apart."""
    reasons, judged = task["reasons"], task["constraints"]
    assert isinstance(reasons, list) and isinstance(judged, list)
    unmet = [each for each in judged if each["verdict"] == "unmet" and each["name"] not in known]
    return [each["text"] for each in (*reasons, *unmet)]


def _joined(texts: Sequence[str]) -> str:
    texts = list(dict.fromkeys(texts))
    more = len(texts) - _SHOWN
    return "; ".join(texts[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _reason(name: str, text: str, advice: str, seconds: float | None = None) -> Reason:
    return {"name": name, "text": text, "advice": advice, "seconds": None if seconds is None else round(seconds, 1)}
