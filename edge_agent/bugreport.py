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
from shared.errors import FieldfareError
from shared.version import VERSION

LINES = 500
"""Of the unit's log."""
TEXT_MAX = 4 << 20
"""Characters of one part; its end is kept."""
_PATIENCE = 30.0
"""Seconds for each program that is asked."""
_GONE = "[redacted]"

_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    # A key's text may lie in one line with \n in it, or in many, each with a date before it, and may be cut off at
    # either end of a log.
    (re.compile(r"-----BEGIN [A-Z0-9 ]+-----.*?(?:-----END [A-Z0-9 ]+-----|\Z)", re.DOTALL), _GONE),
    (re.compile(r"\A.*-----END [A-Z0-9 ]+-----", re.DOTALL), _GONE),
    (re.compile(r"\bff1\.[A-Za-z0-9_.-]+"), f"ff1.{_GONE}"),
    (re.compile(r"://[^/@\s\"']*@"), f"://{_GONE}@"),
    (
        re.compile(
            r"(?i)((?:pass(?:word|wd|phrase)?|secret|credential|api_?key)[\"']?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|\S+)"
        ),
        rf"\1{_GONE}",
    ),
    # Longer than any name, and too long for a word: base64 of something.
    (re.compile(r"(?<![A-Za-z0-9+/])[A-Za-z0-9+/]{56,}={0,2}"), _GONE),
)


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
    return text[-TEXT_MAX:]


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
    # Whatever somebody has put into an environment or a credential may be a secret.
    hidden = re.compile(r"^(Environment|SetCredential|LoadCredential)(\w*=).*$", re.MULTILINE)
    return hidden.sub(rf"\1\2{_GONE}", said)


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
