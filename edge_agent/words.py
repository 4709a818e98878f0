"""What the agent's commands say to people, made of what they say to programs; lines of text.

An answer may come from a daemon of another version, so nothing in it is taken for granted. It never asks anybody.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from shared import cli

Answer = Mapping[str, Any]
VERDICTS = {"met": "ok", "unmet": "NO", "unknown": "unknown", "not_asked": "-"}
"""Of a constraint, for a narrow column."""


def status(found: Answer) -> list[str]:
    """`edge-agent status`: who and how at the top, then what a look should find at once."""
    lines = [f"{found.get('device', 'this device')}: {found.get('state', 'unknown')}"]
    lines += [f"  {found['why']}"] if found.get("why") else []
    rows: list[tuple[str, str]] = []
    if link := found.get("link"):
        rows.append(("link", _link(link)))
    if certificate := found.get("certificate"):
        rows.append(("certificate", _certificate(certificate)))
    if training := found.get("training"):
        rows.append(("training", _training(training)))
    for name, number in (found.get("left") or {}).items():
        rows.append(("left", f"{name} round {number}, to go on from its checkpoint"))
    for each in found.get("obstacles") or []:
        rows.append(("blocked by", f"{each.get('name')}: {each.get('text')}"))
    for name, task in (found.get("tasks") or {}).items():
        rows.append(("task", f"{name}: {_task(task)}"))
    if download := found.get("download"):
        rows.append(("download", progress(download)))
    for name, coming in (found.get("coming") or {}).items():
        if coming.get("retry") is not None:
            rows.append(("download", f"{name} release {coming.get('release')}, next try in {coming['retry']:.0f} s"))
    rows += [("outbox", waiting(each)) for each in found.get("outbox") or []]
    if last := found.get("last_update"):
        rows.append(("last update", f"{last.get('task')} round {last.get('round')}: {last.get('outcome')}"))
    if last := found.get("last_failure"):
        rows.append(("last failure", f"{last.get('task')} round {last.get('round')}: {last.get('detail')}"))
    if closed := (found.get("models") or {}).get("closed"):
        rows.append(("models", f"none can be put where programs look for them: {closed}"))
    if memory := found.get("memory"):
        used = [f"{name} {megabytes(size)}" for name, size in memory.items() if size]
        rows.append(("memory", ", ".join(used) or "-"))
    if "uptime" in found:
        rows.append(("running", f"for {span(found['uptime'])}, version {found.get('version', '-')}"))
    return [cli.printable(line) for line in lines + cli.columns(rows)]


def why(found: Answer) -> list[str]:
    """`edge-agent why`: the answer, what to do about it, then every constraint."""
    lines = [str(found.get("answer", "the agent gave no answer"))]
    advice = [_advised(each) for each in found.get("reasons") or []]
    advice += [_advised(each) for each in found.get("constraints") or [] if each.get("verdict") == "unmet"]
    lines += _headed("what to do", advice)
    for name, task in (found.get("tasks") or {}).items():
        own = {(each["name"], each["text"]) for each in found.get("constraints") or []}
        reasons = [_advised(each) for each in task.get("reasons") or []]
        reasons += [
            _advised(each)
            for each in task.get("constraints") or []
            if each["verdict"] == "unmet" and (each["name"], each["text"]) not in own
        ]
        lines += _headed(f"task {name}", reasons or [str(task.get("answer"))])
    judged = _asked_about(found)
    if judged:
        heads = ("constraint", "", "measured", "wanted", "setting", "from")
        rows = [
            (
                str(each["name"]),
                VERDICTS.get(each["verdict"], str(each["verdict"])),
                value(each["name"], each["value"]),
                value(each["name"], each["threshold"]),
                each["setting"] or "-",
                each["source"],
            )
            for each in judged
        ]
        lines += ["", *cli.columns([heads, *rows])]
    return [cli.printable(line) for line in lines]


def doctor(checks: Iterable[Answer]) -> list[str]:
    """`edge-agent doctor`: a line for each check, with what to do where it is not well."""
    lines = []
    for each in checks:
        lines.append(f"{each['result']:<8} {each['name']}: {each['text']}")
        lines += [f"         -> {each['advice']}"] if each["advice"] else []
    return [cli.printable(line) for line in lines]


def value(name: str, found: float | str | None) -> str:
    """A measured value or a threshold, with the unit of its constraint."""
    if found is None or found == "":
        return "-"
    if isinstance(found, str):
        return found if len(found) <= 40 else found[:37] + "..."
    match name:
        case "memory" | "disk":
            return f"{found / (1 << 20):.0f} MiB"
        case "battery" | "cpu" | "io" | "memory_pressure":
            return f"{found:.4g} %"
        case "heat":
            return f"{found:.4g} °C"
        case "spacing" | "budget":
            return f"{found:.0f} s"
        case _:
            return f"{found:.6g}"


def progress(shown: Answer) -> str:
    """One line about the weights that are on their way."""
    return f"{shown['task']}: {megabytes(shown['bytes'])} of {megabytes(shown['total'])} ({shown['percent']:.0f} %)"


def waiting(shown: Answer) -> str:
    """One line about an update that nobody has answered."""
    what = f"{shown['task']} round {shown['round']}, {megabytes(shown['bytes'])}"
    if shown["asked"]:
        return f"{what}: {shown['asked']} of {shown['chunks']} chunks are on their way"
    times = "not sent yet" if not shown["attempts"] else f"sent {shown['attempts']} times"
    held = f"next try in {shown['next_try']:.0f} s" if shown["next_try"] is not None else "held until somebody is there"
    return f"{what}: {times}, {held}"


def megabytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e6:.1f} MB"


def span(seconds: float) -> str:
    """A length of time by its two largest units."""
    left = int(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def _asked_about(found: Answer) -> list[Answer]:
    """The constraints of the one task that was asked about, or else the device's own."""
    tasks = list((found.get("tasks") or {}).values())
    if len(tasks) == 1 and tasks[0].get("constraints"):
        return list(tasks[0]["constraints"])
    return list(found.get("constraints") or [])


def _link(link: Answer) -> str:
    if not link.get("connected"):
        return f"not connected to {link.get('broker')}: {link.get('cause')}"
    received, sent = link.get("bytes_received", 0), link.get("bytes_sent", 0)
    return f"connected to {link.get('broker')}, {megabytes(received)} received, {megabytes(sent)} sent"


def _certificate(found: Answer) -> str:
    said = f"until {found.get('expires')}, {found.get('days')} days"
    if found.get("renews"):
        said += f", renewed from {found['renews']}"
    return said + (" - EXPIRES SOON" if found.get("expiring") else "")


def _training(found: Answer) -> str:
    where = f"epoch {found.get('epoch')}, step {found.get('step')}"
    return f"{found.get('task')} round {found.get('round')}: {found.get('state')}, {where}"


def _task(found: Answer) -> str:
    if found.get("obstacle"):
        return str(found["obstacle"])
    release = "no release" if found.get("release") is None else f"release {found['release']}"
    if found.get("round") is None:
        return f"{release}, no round yet"
    mine = found.get("last_round_trained")
    done = f", this device's last was {mine}" if mine else ""
    return f"{release}, round {found['round']} of {found.get('rounds')} {found.get('round_state')}{done}"


def _advised(each: Answer) -> str:
    advice = each.get("advice")
    return f"{each.get('text')}" + (f": {advice}" if advice and advice != "wait" else "")


def _headed(head: str, lines: list[str]) -> list[str]:
    return ["", f"{head}:", *(f"  {line}" for line in lines)] if lines else []
