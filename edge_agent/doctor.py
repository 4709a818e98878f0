"""`edge-agent doctor`: looks for what would keep this device from taking part, and says what to do. A function a check.

It changes nothing, and never takes the place of a running agent: it asks that over its socket, and connects to the
broker with the device's identity only where no agent runs. Whatever waits for somebody else is bounded in time.
"""

import contextlib
import io
import json
import os
import pwd
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from edge_agent import clock as clocks
from edge_agent import config as settings
from edge_agent import control, libraries, renewal, sensors
from edge_agent.config import AgentConfig
from edge_agent.pressure import PressureWatch
from edge_agent.renewal import Identity
from edge_agent.store import held
from shared import identity, logs, wire
from shared.control import NotRunning
from shared.driver import Mailbox
from shared.errors import ConfigError, FieldfareError, LinkError, RemoteProtocolError
from shared.messages import DeviceStatus, TaskManifest
from shared.mqtt import Link, LinkDown, LinkEvent, LinkSettings, LinkUp, Published
from shared.topics import Topics
from shared.version import VERSION

Result = Literal["ok", "warning", "failed", "skipped"]

UNIT = "edge-agent.service"
ANSWER = 10.0
"""Seconds for the broker's answer to a message."""
TRIAL = 180.0
"""Seconds in which a child imports PyTorch, tries it, and reads the data sets."""
_DAY = 86_400.0


@dataclass(frozen=True, slots=True)
class Check:
    """What one look found: a sentence, and what to do unless all is well."""

    name: str
    result: Result
    text: str
    advice: str = ""


def examine(path: Path, environ: Mapping[str, str]) -> list[dict[str, str]]:
    """All checks of the device that `path` configures, in the order in which they should be mended."""
    logs.configure("error", "json", environ={}, identifier="doctor", stream=io.StringIO())
    return [asdict(each) for each in _examined(path, environ)]


def _examined(path: Path, environ: Mapping[str, str]) -> list[Check]:
    try:
        config = settings.load(path, environ, files=False)
    except ConfigError as error:
        return [Check("configuration", "failed", str(error), _mend(path, error))]
    found = [Check("configuration", "ok", f"{path} is sound"), zone(config)]
    told, running = daemon(config)
    mine, checks = keys(config, told=told)
    found += checks
    found += [root(config), *clock(mine, clocks.synchronised()), *state(config)]
    found.append(running)
    found += broker(config, mine, told, running)
    found += [pressure(config), triggers(config, told), delegation(told), memory(config)]
    found += shelf(told)
    wanted, contracts = tasks(config)
    found.append(contracts)
    found += training(config, wanted, eyes(config, told))
    return found


def _mend(path: Path, error: ConfigError) -> str:
    if path.exists() and error.key != "broker":
        return "mend that line; edge-agent config check tries it again"
    return "edge-agent enrol URL TOKEN makes it, and so does a device's bundle from aggregator device add"


# -- the device itself ---------------------------------------------------------------------------------------------


def zone(config: AgentConfig, localtime: Path = Path("/etc/localtime")) -> Check:
    """Whether the windows of the policy are in the zone that their owner lives in."""
    name = config.policy.timezone
    here = datetime.now(settings.zone(name, localtime))
    text = f"it is {here:%a %H:%M} in {name or 'the zone of this system'} ({here:%Z})"
    if config.policy.windows and not name and not localtime.exists():
        advice = "set policy.timezone, or the system's zone with timedatectl set-timezone"
        return Check("time zone", "warning", f"{text}: this system has no zone, so policy.windows are in UTC", advice)
    return Check("time zone", "ok", text)


def clock(mine: Identity | None, synchronised: bool, now: float | None = None) -> list[Check]:
    """Whether the clock is set, and fits the certificate."""
    at = time.time() if now is None else now
    here = datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
    advice = "let something set it: timedatectl set-ntp true, or chrony"
    if mine is not None and at < mine.begins:
        days = (mine.begins - at) / _DAY
        text = f"the clock is behind: {here} is {days:.1f} days before the certificate was made"
        return [Check("clock", "warning", f"{text}; the agent goes by the certificate meanwhile", advice)]
    if synchronised:
        return [Check("clock", "ok", f"{here}, set by time from elsewhere")]
    return [Check("clock", "warning", f"{here}, and nothing sets it, as far as the kernel knows", advice)]


def keys(
    config: AgentConfig, now: float | None = None, told: Mapping[str, Any] | None = None
) -> tuple[Identity | None, list[Check]]:
    """Key and certificate: readable by the agent alone, of one pair, of the fleet's CA, and not about to expire.

    Of a key that is encrypted only the running agent knows, by what it has `told`.
    """
    for file in (config.broker.key, config.broker.cert, config.broker.ca):
        if file.exists() and not os.access(file, os.R_OK):
            return None, [Check("identity", "skipped", f"{file} may not be read", "run it as root: sudo")]
    if (hidden := settings.encrypted(config.broker.key)) is not None:
        return None, _encrypted(hidden, told)
    try:
        at = time.time() if now is None else now
        mine = renewal.choose(config, at)
        authorities = identity.load_certificates(config.broker.ca)
    except ConfigError as error:
        return None, [Check("identity", "failed", str(error), "edge-agent enrol makes the device a new identity")]
    found = []
    if (mode := mine.key_file.stat().st_mode) & 0o037:
        text = f"{mine.key_file} has mode {stat.S_IMODE(mode):04o}: others may read the device's key"
        found.append(Check("key", "failed", text, f"chmod 0600 {mine.key_file}, and enrol anew if somebody could"))
    elif mine.key.public_key() != mine.certificate.public_key():
        text = f"{mine.key_file} is not the key of {mine.cert_file}"
        found.append(Check("key", "failed", text, "restore the pair, or edge-agent enrol --again"))
    else:
        found.append(Check("key", "ok", f"{mine.key_file} is of the certificate, and closed to others"))
    if (beside := settings.beside(config.broker.key)).exists():
        text = f"{beside} lies beside {config.broker.key}: the unit loads one of them, whichever its drop-in names"
        found.append(Check("key", "warning", text, "remove the other; enrol anew if they are not the same key"))
    return mine, [*found, _certificate(config, mine, authorities, at)]


def _encrypted(hidden: Path, told: Mapping[str, Any] | None) -> list[Check]:
    key = Check("key", "skipped", f"{hidden} is encrypted: the unit decrypts it for the agent, and for nobody else")
    shown = (told or {}).get("certificate")
    if told is None or not shown:
        text = "only a running agent can tell whether it is of that key"
        return [key, Check("certificate", "skipped", text, f"systemctl start {UNIT}; systemctl status {UNIT}")]
    text = f"{told.get('device')} until {shown['expires'][:10]}, {shown['days']:.0f} days, says the agent"
    if shown["expiring"]:
        return [key, Check("certificate", "warning", text, f"journalctl -u {UNIT} EVENT=renewal.failed may say why")]
    return [key, Check("certificate", "ok", text)]


def _certificate(config: AgentConfig, mine: Identity, authorities: Sequence[Any], now: float) -> Check:
    ends = f"{datetime.fromtimestamp(mine.ends, UTC):%F}"
    renews = "edge-agent renews it" if config.enrol.url else "nothing renews it: [enrol] url is empty"
    advice = (
        f"journalctl -u {UNIT} EVENT=renewal.failed says why"
        if config.enrol.url
        else "ask the operator for a new bundle"
    )
    if now > mine.ends:
        text = f"{mine.cert_file} of {mine.name} expired on {ends}, or this clock is ahead; {renews}"
        return Check("certificate", "failed", text, advice)
    try:
        identity.verify_device(mine.der, authorities, max(now, mine.begins))
    except RemoteProtocolError as error:
        text = f"{mine.cert_file} is not a device's of the CA in {config.broker.ca}: {error.detail}"
        return Check("certificate", "failed", text, "take both from the same fleet: edge-agent enrol --again")
    days = (mine.ends - now) / _DAY
    text = f"{mine.name} until {ends}, {days:.0f} days; {renews}"
    soon = mine.expiring(now)
    return Check("certificate", "warning" if soon else "ok", text, advice if soon else "")


def root(config: AgentConfig) -> Check:
    """Whether the fleet's root record, by which releases are believed, is there."""
    if config.trust.root.exists() and not os.access(config.trust.root, os.R_OK):
        return Check("root record", "skipped", f"{config.trust.root} may not be read", "run it as root: sudo")
    try:
        found = identity.load_root(config.trust.root)
    except ConfigError as error:
        return Check("root record", "failed", str(error), "take it from the device's bundle, or enrol anew")
    return Check("root record", "ok", f"{config.trust.root} pins version {found.version} of fleet {found.fleet}")


def state(config: AgentConfig) -> list[Check]:
    """The state directory: there, closed to others, with room."""
    folder = config.device.state_dir
    try:
        mode = folder.stat().st_mode
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            return [Check("state directory", "skipped", f"{folder} is not there yet; the agent's first start makes it")]
        return [Check("state directory", "skipped", f"{folder}: {error.strerror}", "run it as root: sudo")]
    if not stat.S_ISDIR(mode):
        return [Check("state directory", "failed", f"{folder} is no folder", "move it away")]
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return [Check("state directory", "skipped", f"{folder} may not be looked into", "run it as root: sudo")]
    found = [Check("state directory", "ok", f"{folder} is closed to others")]
    if mode & 0o077:
        text = f"{folder} has mode {stat.S_IMODE(mode):04o}: others may look at releases and updates"
        found = [Check("state directory", "failed", text, f"chmod 0700 {folder}")]
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        text = f"the file system of {folder} is read-only"
        return [*found, Check("disk", "failed", text, "mount it writable; the kernel's log may say why it is not")]
    free, wanted = shutil.disk_usage(folder).free, config.policy.disk_free
    text = f"{free >> 20} MiB are free for {folder}, policy.disk_free asks for {wanted >> 20} MiB"
    if free < wanted:
        return [*found, Check("disk", "failed", text, "free space, or lower policy.disk_free")]
    return [*found, Check("disk", "ok", text)]


def memory(config: AgentConfig) -> Check:
    """Whether there is the memory that a trainer starts with."""
    free = sensors.memory_free(config.device.proc_root)
    wanted = config.policy.memory_free
    if free is None:
        return Check("memory", "warning", f"{config.device.proc_root}/meminfo does not tell", "")
    text = f"{free >> 20} MiB are available, policy.memory_free asks for {wanted >> 20} MiB"
    if free < wanted:
        return Check("memory", "warning", text, "training waits until there is more, or lower policy.memory_free")
    return Check("memory", "ok", text)


# -- the agent and its broker --------------------------------------------------------------------------------------


def daemon(config: AgentConfig) -> tuple[dict[str, Any] | None, Check]:
    """What the running agent says, and whether there is one."""
    try:
        told = control.ask(config.device.run_dir, control.Request("status"))
    except NotRunning:
        if _unit_active():
            text = f"{UNIT} is active, but does not listen in {config.device.run_dir}"
            return None, Check(
                "agent", "failed", text, f"is device.run_dir the unit's own? Its log says more: journalctl -u {UNIT}"
            )
        return None, Check("agent", "warning", "it is not running", "systemctl enable --now edge-agent")
    except FieldfareError as error:
        return None, Check("agent", "skipped", str(error), "run it as root: sudo")
    return told, Check("agent", "ok", f"version {told.get('version')} runs: {told.get('state')}")


def broker(config: AgentConfig, mine: Identity | None, told: dict[str, Any] | None, running: Check) -> list[Check]:
    """Whether the broker can be reached, and takes what this device has to say."""
    if told is not None:
        return _asked_of_daemon(config, told)
    if running.result != "warning":
        # Whoever connects under the device's name ends the session of the agent that has it.
        return [Check("broker", "skipped", "an agent may be connected, and cannot be asked", running.advice)]
    if mine is None:
        return [Check("broker", "skipped", "without an identity that can be read nobody lets this device in")]
    return _connected(config, mine)


def _asked_of_daemon(config: AgentConfig, told: dict[str, Any]) -> list[Check]:
    link = told.get("link") or {}
    if not link.get("connected"):
        return [Check("broker", "failed", f"{link.get('broker')}: {link.get('cause')}", _reach(config))]
    reached = Check("broker", "ok", f"the agent is connected to {link.get('broker')}")
    try:
        answer = control.ask(config.device.run_dir, control.Request("probe"))
    except FieldfareError as error:
        return [reached, Check("permission", "failed", f"a message was not answered: {error}", _reach(config))]
    return [reached, _permission(bool(answer.get("published")), str(answer.get("cause")))]


def _permission(published: bool, cause: str) -> Check:
    if published:
        return Check("permission", "ok", "the broker took a message of this device's")
    advice = "the broker's access list must let this device publish: aggregator broker render writes it"
    return Check("permission", "failed", f"the broker refused a message of this device's: {cause}", advice)


def _connected(config: AgentConfig, mine: Identity) -> list[Check]:
    """A connection of our own, as the agent would make it."""
    mailbox: Mailbox[LinkEvent] = Mailbox()
    where = f"{config.broker.host}:{config.broker.port}"
    link = Link(
        LinkSettings(
            host=config.broker.host,
            port=config.broker.port,
            client_id=mine.name,
            ca=config.broker.ca,
            cert=mine.cert_file,
            key=mine.key_file,
            connect_timeout=config.broker.connect_timeout,
            clock=lambda: max(time.time(), mine.begins),
        ),
        mailbox,
    )
    link.start()
    try:
        event = _first(mailbox, (LinkUp, LinkDown), config.broker.connect_timeout + 5.0)
        if not isinstance(event, LinkUp):
            cause = event.cause if isinstance(event, LinkDown) else f"no answer from {where}"
            return [Check("broker", "failed", cause, _reach(config))]
        reached = Check("broker", "ok", f"{where} lets {mine.name} in")
        # Not retained, and of a session that nobody knows: whoever hears it makes nothing of it.
        words = DeviceStatus(1, os.urandom(8), False, VERSION, [], False, [], [])
        link.publish(Topics(config.broker.prefix).device_status(mine.name), wire.pack(words))
        answer = _first(mailbox, (Published, LinkDown), ANSWER)
        if isinstance(answer, Published):
            return [reached, _permission(not answer.refusal, answer.refusal)]
        cause = answer.cause if isinstance(answer, LinkDown) else f"no acknowledgement within {ANSWER:g} s"
        return [reached, _permission(False, cause)]
    except LinkError as error:
        return [Check("broker", "failed", str(error), _reach(config))]
    finally:
        link.stop()


def _first(mailbox: Mailbox[LinkEvent], kinds: tuple[type[LinkEvent], ...], seconds: float) -> LinkEvent | None:
    """The first event of these kinds; None if none comes in time."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        for event in mailbox.take(left):
            if isinstance(event, kinds):
                return event
    return None


def _reach(config: AgentConfig) -> str:
    return f"check [broker] host and port, the network and firewall up to {config.broker.host}, and the broker's log"


def _unit_active() -> bool:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        ran = subprocess.run(
            ["systemctl", "--quiet", "is-active", UNIT], timeout=10.0, capture_output=True, check=False
        )
        return ran.returncode == 0
    return False


# -- what the kernel lends -----------------------------------------------------------------------------------------


def pressure(config: AgentConfig) -> Check:
    """Whether the kernel tells how long tasks wait."""
    absent = []
    for name in ("cpu", "memory", "io"):
        try:
            (config.device.proc_root / "pressure" / name).read_text()
        except OSError as error:
            absent.append(f"{name} ({error.strerror})")
    if absent:
        text = f"no pressure files for {', '.join(absent)}: the load average takes their place"
        return Check("pressure", "warning", text, "a kernel with CONFIG_PSI, booted with psi=1, judges load better")
    return Check("pressure", "ok", "the kernel says how long tasks wait for CPU, memory and storage")


def triggers(config: AgentConfig, told: dict[str, Any] | None) -> Check:
    """Whether the kernel wakes the agent when load rises."""
    advice = f"it looks every {config.policy.sense:g} s instead (policy.sense); Linux 6.5 lets everybody have them"
    if told is not None:
        said = str(told.get("sensing"))
        woken = said.startswith("by pressure")
        text = f"load is noticed {said}"
        return Check("pressure triggers", "ok" if woken else "warning", text, "" if woken else advice)
    policy = config.policy
    limits = {"cpu": policy.cpu_pressure, "memory": policy.memory_pressure, "io": policy.io_pressure}
    watch = PressureWatch(config.device.proc_root, limits, lambda: None)
    watch.start()
    refusal = watch.refusal
    watch.stop()
    if refusal:
        return Check("pressure triggers", "warning", f"the kernel does not wake this user: {refusal}", advice)
    return Check("pressure triggers", "ok", "the kernel wakes this user when load rises; the agent's may be another")


def delegation(told: dict[str, Any] | None) -> Check:
    """Whether the trainer has a control group of its own, with the limits that were asked for."""
    found = None if told is None else told.get("sandbox")
    if found is None:
        return Check("control groups", "skipped", "only a running agent knows what systemd lends it")
    if not found.get("delegated"):
        text = "none are lent to the agent: its trainer is held by its own limits, and frozen by SIGSTOP"
        return Check("control groups", "warning", text, "run it as edge-agent.service, which has Delegate=")
    if missing := found.get("missing"):
        causes: dict[str, list[str]] = {}
        for name, cause in missing.items():
            causes.setdefault(cause, []).append(name)
        lacks = "; ".join(f"{', '.join(names)} ({cause})" for cause, names in causes.items())
        text = f"the trainer has a group of its own, without {lacks}"
        return Check(
            "control groups", "warning", text, "systemd.unified_cgroup_hierarchy=1 on the kernel's command line"
        )
    return Check("control groups", "ok", "the trainer has a group of its own with all its limits")


def shelf(told: Mapping[str, Any] | None) -> list[Check]:
    """Whether the agent can put models where programs look for them; what its unit lets it write only it knows."""
    found = (told or {}).get("models") or {}
    if not found.get("closed"):
        return []
    advice = "docs/cli.md says how to open device.models to the agent, under Models"
    return [Check("models", "failed", found["closed"], advice)]


# -- training ------------------------------------------------------------------------------------------------------


def tasks(config: AgentConfig) -> tuple[list[TaskManifest], Check]:
    """The tasks that this device holds, and whether it has a data set for each."""
    try:
        found = held(config.device.state_dir)
    except OSError as error:
        return [], Check("tasks", "skipped", f"{error.filename}: {error.strerror}")
    missing = sorted({each.data.dataset for each in found if each.data.dataset not in config.data})
    if missing:
        text = f"no data set here for {', '.join(missing)}, which tasks ask for"
        return found, Check("tasks", "warning", text, f"say in agent.toml where it lies: path in [data.{missing[0]}]")
    names = ", ".join(each.task for each in found) or "none yet"
    return found, Check("tasks", "ok", f"tasks on this device: {names}")


@dataclass(frozen=True, slots=True)
class Eyes:
    """Who looks at data, and from where: what root sees in its own place proves nothing."""

    enter: tuple[str, ...] = ()
    """Command that what follows it is run by."""
    user: Mapping[str, Any] = field(default_factory=dict)
    """For subprocess.run, where there is nothing to enter."""
    root: Path = Path("/")

    def see(self, path: Path) -> bool:
        """Whether there is this file or folder."""
        return os.path.exists(self.root / path.relative_to("/"))


def eyes(config: AgentConfig, told: Mapping[str, Any] | None) -> Eyes:
    """Those of the running agent where root asks: its unit's drop-ins open and close folders for it alone.

    Where no agent runs those of its user.
    """
    with contextlib.suppress(OSError, KeyError, ValueError):
        if os.geteuid() != 0:
            return Eyes()
        if told is not None and shutil.which("nsenter") and shutil.which("setpriv"):
            process = Path("/proc") / str(int(told["pid"]))
            lines = (line.partition(":") for line in (process / "status").read_text().splitlines())
            ids = {name: value.split() for name, _, value in lines}
            if (user := ids["Uid"][1]) != "0":
                groups = f"--groups={','.join(ids['Groups'])}" if ids["Groups"] else "--clear-groups"
                become = ("setpriv", f"--reuid={user}", f"--regid={ids['Gid'][1]}", groups)
                return Eyes(("nsenter", f"--target={process.name}", "--mount", *become), {}, process / "root")
        if owner := config.device.state_dir.stat().st_uid:
            who = pwd.getpwuid(owner)
            extra = os.getgrouplist(who.pw_name, who.pw_gid)
            return Eyes(user={"user": owner, "group": who.pw_gid, "extra_groups": extra})
    return Eyes()


def training(config: AgentConfig, held_tasks: Sequence[TaskManifest], look: Eyes) -> list[Check]:
    """PyTorch in a child behind the trainer's limits; then each data set, as the tasks want it, read by that child."""
    absent = [_absent(name, each.path) for name, each in config.data.items() if not look.see(each.path)]
    if libraries.present(config.trainer.python) is False:
        advice = "sudo edge-agent trainer install"
        return [Check("trainer", "failed", "PyTorch is not installed for the agent", advice), *absent]
    wanted = [
        {"task": each.task, "source": {"kind": there.format, "path": str(there.path)}, "contract": each.data}
        for each in held_tasks
        if (there := config.data.get(each.data.dataset)) is not None and look.see(there.path)
    ]
    found, why = _tried(config, msgspec.json.encode(wanted), look)
    if found is None:
        advice = "sudo edge-agent trainer install repairs it; raise trainer.memory_max if it ran out of memory"
        return [Check("trainer", "failed", f"PyTorch does not work in the trainer: {why}", advice), *absent]
    works = Check("trainer", "ok", f"PyTorch {found['torch']} works behind the trainer's limits")
    return [works, *absent, *_data(config, found["data"], look)]


def _absent(name: str, path: Path) -> Check:
    return Check(f"data {name}", "failed", f"{path} is not there", f"put it there, or mend path in [data.{name}]")


def _data(config: AgentConfig, found: Iterable[Mapping[str, Any]], look: Eyes) -> list[Check]:
    checks = []
    seen = set()
    for each in found:
        seen.add(each["dataset"])
        name = f"data {each['dataset']}"
        if each["refused"]:
            text = f"task {each['task']}: {each['refused']}"
            blind = "" if look.enter else "; drop-ins of the unit show only while it runs"
            checks.append(Check(name, "failed", text, f"mend the file that is named{blind}"))
        else:
            checks.append(Check(name, "ok", f"{each['examples']} examples as task {each['task']} wants them"))
    for name, there in config.data.items():
        if name not in seen and look.see(there.path):
            checks.append(Check(f"data {name}", "ok", f"{there.path} is there; no task here asks for it"))
    return checks


def _tried(config: AgentConfig, wanted: bytes, look: Eyes) -> tuple[dict[str, Any] | None, str]:
    """What edge_agent.trial found, or why it failed."""
    python = str(config.trainer.python or sys.executable)
    command = [*look.enter, python, "-P", "-m", "edge_agent.confined", "--trial", f"--parent={os.getpid()}"]
    command += [f"--memory-max={config.trainer.memory_max}", f"--nice={config.trainer.nice}"]
    code = [] if config.trainer.python else [str(Path(__file__).resolve().parent.parent)]
    code += [os.path.abspath(each) for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    environ = {"PATH": os.environ.get("PATH", os.defpath), "PYTHONPATH": os.pathsep.join(code)}
    try:
        ran = subprocess.run(
            command, input=wanted, capture_output=True, timeout=TRIAL, cwd="/", env=environ, **look.user
        )
    except subprocess.TimeoutExpired:
        return None, f"it did nothing for {TRIAL:g} s"
    except OSError as error:
        return None, f"{python}: {error.strerror}"
    if ran.returncode != 0:
        words = ran.stderr.decode("utf-8", "replace").strip().splitlines()
        return None, f"signal {-ran.returncode}" if ran.returncode < 0 else words[-1] if words else "no word"
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found, ""
