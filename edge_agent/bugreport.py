"""`edge-agent bugreport`: what a developer would ask for, in one archive, and nothing that is a secret.

Guarantee: no file of keys, certificates, data, weights or updates is opened for it. What programs print (the log, the
unit, the configuration) goes through `redacted`, which takes out key text, join tokens, passwords and whatever looks
like them; when in doubt it takes out too much.
"""

import gzip
import io
import json
import platform
import re
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from edge_agent import config as settings
from edge_agent import control, doctor, install
from shared import config
from shared.errors import FieldfareError, Reason, Refused
from shared.version import VERSION

LINES = 500
"""Of the unit's log."""
TEXT_MAX = 4 << 20
"""Characters of one part; its end is kept."""
_PATIENCE = 30.0
"""Seconds for each program that is asked."""
_GONE = "[redacted]"

_CALLED = (
    r"(?:pass(?:wd|word|phrase|code)|pass(?![a-z])|secret|token|credential|psk(?![a-z])|(?<![a-z])pwd(?![a-z])"
    r"|(?:api|access|private|shared|session|encryption)[_.-]?key|auth(?:orization)?(?![a-z])|cookie"
    r"|(?<![a-z])(?:sig|signature)(?![a-z]))"
)
"""How a secret is called."""
_OURS = "|".join(each.value for each in (*Reason, *Refused) if re.search(_CALLED, each.value))
"""Reasons are told as `bad_token: what that means`."""
_NAME = rf"(?<![\w.-])(?!(?:{_OURS})\b)[\w.-]*{_CALLED}[\w.-]*"
_QUOTED = r"""\\+".*?\\+"|\\+'.*?\\+'|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?"""
"""A text in quotes, be it inside of another."""
_BARE = r"""(?:[^\s"']|["'](?=[^\s,}\]]))+"""
"""One without, up to a space or the end of the text that it is in."""

_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    # A key's text may lie in one line with \n in it, or in many, each with a date before it, and may be cut off at
    # either end of a log.
    (re.compile(r"-----BEGIN [A-Z0-9 ]+-----.*?(?:-----END [A-Z0-9 ]+-----|\Z)", re.DOTALL), _GONE),
    (re.compile(r"\A.*-----END [A-Z0-9 ]+-----", re.DOTALL), _GONE),
    (re.compile(r"\bff1\.[A-Za-z0-9_.-]+"), f"ff1.{_GONE}"),
    (re.compile(r"\beyJ[\w-]+\.[\w.-]+"), _GONE),
    (re.compile(r"://[^/\s\"']*@"), f"://{_GONE}@"),
    # Up to the end of the line: these are of several words.
    (
        re.compile(rf"(?i)((?:authorization|cookie|password|passphrase)[\"']?[ \t]*:[ \t]*)(?:{_QUOTED}|[^\n\"']+)"),
        rf"\1{_GONE}",
    ),
    (re.compile(r"\b((?i:bearer|basic)[ \t]+)(?=\S*[0-9A-Z=])[\w+/=.~-]{4,}"), rf"\1{_GONE}"),
    (re.compile(rf"(?i)({_NAME}\\*[\"']?[ \t]*[=:][ \t]*)(?:{_QUOTED}|{_BARE})"), rf"\1{_GONE}"),
    # An option and its value; then, in a sentence, what looks like no word.
    (re.compile(rf"(?i)((?<!\S)(?=-){_NAME}[ \t]+)(?:{_QUOTED}|{_BARE})"), rf"\1{_GONE}"),
    (re.compile(rf"(?i)({_NAME}[ \t]+(?:is[ \t]+)?)(?=[^\s=:]*[0-9])[^\s=:]{{6,}}"), rf"\1{_GONE}"),
    (re.compile(r"((?<!\S)(?:-u|-U|--user|--proxy-user)[ \t=]*)[^\s:]+:\S+"), rf"\1{_GONE}"),
    (re.compile(r"(?<![A-Za-z0-9+/])[A-Za-z0-9+/]{56,}={0,2}"), _GONE),
)
# Whatever somebody has put into an environment or a credential may be a secret, on all the lines that it goes over; a
# comment between them ends nothing.
_ENVIRONMENT = re.compile(
    r"^([ \t]*(?:Environment|SetCredential|LoadCredential)\w*[ \t]*=)(?:.*\\[ \t]*\n(?:[ \t]*[#;].*\n)*)*.*$",
    re.MULTILINE,
)
_LONG = re.compile(r"[A-Za-z0-9+/_-]{40,}={0,2}")


def collect(path: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The parts of a report about the device that `path` configures, by file name, redacted."""
    parts = {
        "versions.json": _json(_versions()),
        "config.json": _configuration(path, environ),
        "status.json": _asked(path, environ, control.Request("status")),
        "why.json": _asked(path, environ, control.Request("why")),
        "doctor.json": _json({"checks": doctor.examine(path, environ)}),
        "unit.txt": _unit(),
        "log.txt": _ran("journalctl", f"--unit={doctor.UNIT}", f"--lines={LINES}", "--output=short-iso", "--no-pager"),
        "kernel.txt": _kernel(),
    }
    return {name: redacted(text) for name, text in parts.items()}


def pack(parts: Mapping[str, str], target: Path) -> bytes:
    """The archive, whose folder has the target's name; the same parts give the same bytes."""
    folder = target.name.split(".")[0] or "bugreport"
    whole = io.BytesIO()
    with gzip.GzipFile(fileobj=whole, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for name, text in parts.items():
            data = text.encode("utf-8", "replace")
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size, member.mode = len(data), 0o600
            archive.addfile(member, io.BytesIO(data))
    return whole.getvalue()


def redacted(text: str) -> str:
    """The end of a text, without what is or looks like a secret."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return _LONG.sub(_unless_plain, text)[-TEXT_MAX:]


def _unless_plain(found: re.Match[str]) -> str:
    """A long run of characters, unless it is a text in base64 or a number; paths and names with hyphens are neither."""
    run = found[0]
    parts, limit = (run.split("/"), 20) if run.startswith("/") else ([run], 40)
    return _GONE if any(len(part) >= limit and _random(part) for part in parts) else run


def _random(word: str) -> bool:
    digit = any(each.isdigit() for each in word)
    return digit and (any(each.isupper() for each in word) or not set(word) & set("-_/"))


def _versions() -> dict[str, object]:
    release = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    trainer = install.installed()
    names = sorted({each.name for each in metadata.distributions()})
    return {
        "fieldfare": VERSION,
        "python": sys.version,
        "system": release.get("PRETTY_NAME"),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "torch": trainer.version,
        "torch_tested": trainer.wanted,
        "packages": {name: metadata.version(name) for name in names},
    }


def _configuration(path: Path, environ: Mapping[str, str]) -> str:
    try:
        return _json(config.effective(settings.load(path, environ, files=False)))
    except FieldfareError as error:
        return str(error)


def _asked(path: Path, environ: Mapping[str, str], request: control.Request) -> str:
    try:
        return _json(control.ask(settings.load(path, environ, files=False).device.run_dir, request))
    except FieldfareError as error:
        return str(error)


def _unit() -> str:
    said = _ran("systemctl", "show", doctor.UNIT) + "\n" + _ran("systemctl", "cat", "--no-pager", doctor.UNIT)
    return _ENVIRONMENT.sub(rf"\1{_GONE}", said)


def _kernel() -> str:
    """Pressure, memory, and what the unit's control group offers."""
    files = [
        *sorted(Path("/proc/pressure").glob("*")),
        Path("/proc/loadavg"),
        Path("/proc/meminfo"),
        Path("/proc/cmdline"),
    ]
    for mount in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        unit = mount / doctor.UNIT  # by the unit's Slice=
        files += [
            mount / "cgroup.controllers",
            *(unit / name for name in ("cgroup.controllers", "cgroup.subtree_control")),
        ]
        for group in ("agent", "trainer"):
            files += sorted((unit / group).glob("cgroup.*"))
            files += [
                unit / group / name for name in ("cpu.idle", "cpu.weight", "memory.max", "memory.high", "pids.max")
            ]
    found = []
    for file in files:
        try:
            found.append(f"{file}\n{file.read_text(errors='replace')}")
        except OSError as error:
            found.append(f"{file}\n{error.strerror}\n")
    return "\n".join(found)


def _ran(*command: str) -> str:
    """What a program prints, or why it does not."""
    try:
        ran = subprocess.run(command, capture_output=True, timeout=_PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    return (ran.stdout + ran.stderr).decode("utf-8", "replace")


def _json(found: Mapping[str, object]) -> str:
    return json.dumps(found, indent=2, default=str) + "\n"
