"""edge_agent.sandbox: the control groups that are delegated to the agent, on plain files and in the kernel."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_agent.sandbox import PIDS_MAX, Sandbox

SERVICE = {"INVOCATION_ID": "0123"}
UNIT = "system.slice/edge-agent.service"
FILES = ("cpu.idle", "cpu.weight", "pids.max", "memory.high", "memory.max", "memory.oom.group", "cgroup.freeze")
REAL = Path("/sys/fs/cgroup/unified")


class Tree:
    """A machine of plain files, which take what is written as the kernel's do."""

    def __init__(self, root: Path, mount: str = "fs/cgroup", without: tuple[str, ...] = ()) -> None:
        self.proc, self.sys = root / "proc", root / "sys"
        self.unit = self.sys / mount / UNIT
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "self/cgroup").write_text(f"12:cpu:/x\n0::/{UNIT}\n")
        (self.unit / "agent").mkdir(parents=True)
        for group in (self.unit, self.unit / "agent"):
            (group / "cgroup.procs").write_text("")
        (self.unit / "cgroup.subtree_control").write_text("cpu memory pids")
        (self.unit / "trainer").mkdir()
        for name in FILES:
            if name not in without:
                (self.unit / "trainer" / name).write_text("")

    def open(self, environ: dict[str, str] | None = None, memory_max: int = 1 << 30) -> Sandbox | None:
        """The sandbox on it."""
        return Sandbox.open(SERVICE if environ is None else environ, self.proc, self.sys, memory_max)

    def value(self, name: str) -> str:
        """What a file of the trainer's group holds."""
        return (self.unit / "trainer" / name).read_text()


@pytest.mark.parametrize("mount", ["fs/cgroup", "fs/cgroup/unified"])
def test_the_values_written(tmp_path: Path, mount: str) -> None:
    """The trainer's group is idle and bounded, and the agent lives in one beside it."""
    tree = Tree(tmp_path, mount)
    sandbox = tree.open()
    assert sandbox is not None and sandbox.trainer == tree.unit / "trainer"
    assert (tree.unit / "agent/cgroup.procs").read_text() == str(os.getpid())
    assert (tree.value("cpu.idle"), tree.value("pids.max")) == ("1", str(PIDS_MAX))
    assert int(tree.value("memory.max")) == 1 << 30 and tree.value("memory.oom.group") == "1"
    assert 0.85 * (1 << 30) < int(tree.value("memory.high")) < 0.91 * (1 << 30)
    assert tree.value("cpu.weight") == ""
    assert sandbox.freeze(True) and tree.value("cgroup.freeze") == "1"
    assert sandbox.freeze(False) and tree.value("cgroup.freeze") == "0"


def test_without_a_limit(tmp_path: Path) -> None:
    """An owner who sets no limit gets none."""
    tree = Tree(tmp_path)
    assert tree.open(memory_max=0) is not None
    assert tree.value("memory.max") == tree.value("memory.high") == ""


def test_what_the_kernel_lacks(tmp_path: Path) -> None:
    """No cpu.idle: the smallest weight. Nothing of memory, no freezer: named as missing, and the rest holds."""
    tree = Tree(tmp_path, without=("cpu.idle", "memory.high", "memory.max", "memory.oom.group", "cgroup.freeze"))
    sandbox = tree.open()
    assert sandbox is not None and tree.value("cpu.weight") == "1"
    assert not sandbox.freezes and not sandbox.freeze(True)
    assert set(sandbox.missing) == {"cpu.idle", "memory.high", "memory.max", "memory.oom.group", "cgroup.freeze"}


def test_a_write_that_has_no_effect(tmp_path: Path) -> None:
    """A value that does not read back is missing: the kernel refused it without a word."""
    tree = Tree(tmp_path)
    for name in ("cpu.idle", "cgroup.freeze"):
        (tree.unit / "trainer" / name).unlink()
        (tree.unit / "trainer" / name).symlink_to("/dev/null")
    sandbox = tree.open()
    assert sandbox is not None and "cpu.idle" in sandbox.missing and tree.value("cpu.weight") == "1"
    assert not sandbox.freeze(True)


def test_nothing_is_delegated(tmp_path: Path) -> None:
    """Started by hand, in a session, without a unit of its own, or without a hierarchy: hands off."""
    tree = Tree(tmp_path)
    assert tree.open({}) is None
    for group in (tree.sys / "fs/cgroup/user.slice/session-1.scope", tree.sys / "x.service"):
        (group / "trainer").mkdir(parents=True)  # which could be used
        for name in ("cgroup.procs", "agent/cgroup.procs", "cgroup.subtree_control", *(f"trainer/{n}" for n in FILES)):
            (group / name).parent.mkdir(exist_ok=True)
            (group / name).write_text("")
    for line in ("0::/user.slice/session-1.scope", "0::/", "0::/../../x.service", "1:cpu:/x.service", ""):
        (tree.proc / "self/cgroup").write_text(line + "\n")
        assert tree.open() is None
    (tree.proc / "self/cgroup").unlink()
    assert tree.open() is None
    assert (tree.unit / "agent/cgroup.procs").read_text() == ""


def test_a_unit_without_delegation(tmp_path: Path) -> None:
    """Where its own group cannot be written, the agent stays where it is."""
    tree = Tree(tmp_path)
    (tree.unit / "agent/cgroup.procs").unlink()
    assert tree.open() is None


def test_started_once_more_in_its_group(tmp_path: Path) -> None:
    """A process that is in the agent's group already finds the same unit."""
    tree = Tree(tmp_path)
    (tree.proc / "self/cgroup").write_text(f"0::/{UNIT}/agent\n")
    sandbox = tree.open()
    assert sandbox is not None and sandbox.trainer == tree.unit / "trainer"


SCRIPT = """
import os, subprocess, sys, time
from pathlib import Path
unit = Path(sys.argv[1])
(unit / "cgroup.procs").write_text(str(os.getpid()))
from edge_agent.sandbox import Sandbox
sandbox = Sandbox.open({"INVOCATION_ID": "1"}, Path("/proc"), Path("/sys"), 0)
assert sandbox is not None, Path("/proc/self/cgroup").read_text()
assert Path("/proc/self/cgroup").read_text().splitlines()[-1].endswith("/agent")
busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
(sandbox.trainer / "cgroup.procs").write_text(str(busy.pid))
def spent():
    return sum(map(int, Path(f"/proc/{busy.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
assert sandbox.freezes and sandbox.freeze(True)
while "frozen 1" not in (sandbox.trainer / "cgroup.events").read_text():
    time.sleep(0.01)
before = spent()
time.sleep(0.3)
assert spent() == before
assert sandbox.freeze(False)
while spent() <= before:
    time.sleep(0.01)
assert sandbox.freeze(True)
busy.kill()
assert busy.wait(10) == -9
print("froze")
"""


@pytest.mark.skipif(not os.access(REAL / "cgroup.procs", os.W_OK), reason="needs root and a hybrid cgroup tree")
def test_the_kernel_freezes_it() -> None:
    """In a real group the trainer takes no time while it is frozen, goes on when thawed, and can be killed frozen."""
    unit = REAL / f"fieldfare-test-{os.getpid()}.service"
    unit.mkdir()
    try:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(unit)], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stdout) == (0, "froze\n"), done.stderr
    finally:
        for group in (unit / "agent", unit / "trainer", unit):
            for _ in range(100):
                try:
                    group.rmdir()
                    break
                except OSError:
                    time.sleep(0.05)
