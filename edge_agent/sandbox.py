"""The control groups that systemd delegates to the agent's unit: the trainer lives in one of its own.

    /sys/fs/cgroup/edge-agent.service                   the unit, with `Delegate=`
        agent                                           this process
        trainer                                         the child: idle, bounded, and frozen as one

Every value is written unbuffered and read back, since a buffered write hides the kernel's refusal. What the kernel or
the unit does not offer (a hybrid hierarchy has no controllers here, but can freeze) is left out and named in `missing`:
the child's own limits and SIGSTOP take its place. Nothing outside the unit's own group is ever touched.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

_CONTROLLERS = ("cpu", "memory", "pids")
PIDS_MAX = 512
"""Threads count as well."""


class Sandbox:
    """The trainer's group; `open` finds it."""

    def __init__(self, unit: Path) -> None:
        self._unit, self.trainer = unit, unit / "trainer"
        self.missing: dict[str, str] = {}
        """Files that could not be set, with the reason."""

    @classmethod
    def open(cls, environ: Mapping[str, str], proc_root: Path, sys_root: Path, memory_max: int) -> Self | None:
        """Make the groups below the unit that this process runs in and move it; None where nothing is delegated.

        `memory_max` in bytes bounds the trainer's group, page cache included; 0 does not.
        """
        unit = _unit(environ, proc_root, sys_root)
        if unit is None:
            return None
        sandbox = cls(unit)
        try:
            for name in ("agent", "trainer"):
                (unit / name).mkdir(exist_ok=True)
            _write(unit / "agent" / "cgroup.procs", str(os.getpid()))
        except OSError:
            return None  # not ours: the unit has no Delegate=
        for controller in _CONTROLLERS:
            sandbox._enable(controller)
        if not sandbox._set(sandbox.trainer / "cpu.idle", "1"):
            sandbox._set(sandbox.trainer / "cpu.weight", "1")
        sandbox._set(sandbox.trainer / "pids.max", str(PIDS_MAX))
        if memory_max:
            page = os.sysconf("SC_PAGE_SIZE")
            limit = memory_max // page * page
            # A little earlier it is slowed down and has to give back, instead of being killed at once.
            sandbox._set(sandbox.trainer / "memory.high", str(limit // 10 * 9 // page * page))
            sandbox._set(sandbox.trainer / "memory.max", str(limit))
            sandbox._set(sandbox.trainer / "memory.oom.group", "1")
        return sandbox

    def freeze(self, frozen: bool) -> bool:
        """Freeze or thaw everything in the trainer's group; False where that cannot be done."""
        return self._set(self.trainer / "cgroup.freeze", "1" if frozen else "0")

    def holds(self, pid: int) -> bool:
        """Whether this process is in the trainer's group; False where that cannot be read."""
        try:
            return str(pid) in (self.trainer / "cgroup.procs").read_text().split()
        except OSError:
            return False

    @property
    def oom_kills(self) -> int:
        """Processes of the trainer's group that the kernel has ended for want of memory; 0 where it does not say."""
        try:
            lines = (self.trainer / "memory.events").read_text().splitlines()
            return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
        except (OSError, IndexError, ValueError):
            return 0

    @property
    def freezes(self) -> bool:
        """Whether the kernel can freeze the group."""
        return (self.trainer / "cgroup.freeze").exists()

    def _enable(self, controller: str) -> None:
        file = self._unit / "cgroup.subtree_control"
        try:
            if controller not in file.read_text().split():
                _write(file, f"+{controller}")
        except OSError as error:
            self.missing[controller] = error.strerror or str(error)

    def _set(self, file: Path, value: str) -> bool:
        """Write a value and see it there."""
        try:
            _write(file, value)
            found = file.read_text().strip()
        except OSError as error:
            self.missing[file.name] = error.strerror or str(error)
            return False
        if found != value:
            self.missing[file.name] = f"reads {found[:80]!r} after {value!r} was written"
            return False
        return True


def _unit(environ: Mapping[str, str], proc_root: Path, sys_root: Path) -> Path | None:
    """The unit's own group of the unified hierarchy, where systemd started this process as a service."""
    if "INVOCATION_ID" not in environ:
        return None  # a terminal's group is not ours to rearrange
    try:
        lines = (proc_root / "self/cgroup").read_text().splitlines()
    except OSError:
        return None
    path = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "")
    inside = [part for part in path.split("/") if part]
    if inside and inside[-1] == "agent":
        inside.pop()  # an agent that was started by exec in the midst
    if not inside or ".." in inside or not inside[-1].endswith(".service"):
        return None
    for mount in (sys_root / "fs/cgroup", sys_root / "fs/cgroup/unified"):
        found = mount.joinpath(*inside)
        if (found / "cgroup.procs").exists():
            return found
    return None


def _write(file: Path, value: str) -> None:
    handle = os.open(file, os.O_WRONLY)
    try:
        os.write(handle, value.encode())
    finally:
        os.close(handle)
