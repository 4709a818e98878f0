"""A machine for tests: Debian with systemd as PID 1, in a container of its own, thrown away afterwards.

    off -> boot -> on -> power_off -> off -> boot ...      (the disk stays; `pull_the_plug` as well)
                  on -> reboot -> on
    off, on -> end                                         (nothing stays)

The root file system is made once (mmdebstrap, 45 s) and kept below the user's cache, by the list of its packages. Each
machine writes to an overlay on it, in memory. Machines that share a `Wire` share one network, a loopback with nothing
else on it, and each has control groups of its own. Everything is mounted in a mount namespace that a process of ours
holds open, and everything dies with the tests (setpriv --pdeathsig), so nothing is left on this machine whatever ends
the tests, but for empty control groups.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.hostile.daemon import LEASH, until

SUITE = "bookworm"
PACKAGES = (
    "systemd", "systemd-sysv", "dbus", "libpam-systemd", "libnss-systemd", "python3", "python3-venv", "iproute2",
    "procps", "ca-certificates", "openssl", "mosquitto", "mosquitto-clients", "rsyslog", "libfaketime",
    "libstdc++6", "zlib1g",
)  # fmt: skip
_PREPARED = (
    # Nothing that a scenario does not start itself, a journal that outlives a reboot, and no log of the kernel's, which
    # is the host's.
    'chroot "$1" systemctl -q disable mosquitto.service rsyslog.service apt-daily.timer apt-daily-upgrade.timer',
    'chroot "$1" systemctl -q mask systemd-networkd.service systemd-resolved.service systemd-timesyncd.service',
    'mkdir -p "$1/var/log/journal" "$1/etc/systemd/journald.conf.d"',
    "printf '[Journal]\\nReadKMsg=no\\nRateLimitIntervalSec=0\\nSyncIntervalSec=1s\\n'"
    ' >"$1/etc/systemd/journald.conf.d/tests.conf"',
    'rm -f "$1/etc/resolv.conf"',
)
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CONTROLLERS = ("memory", "cpu", "cpuacct", "pids")
_WANTS_REBOOT = 133
"""What systemd-nspawn ends with when the machine restarts."""


def missing() -> str | None:
    """Why there can be no machine here; None if there can."""
    absent = [name for name in ("systemd-nspawn", "mmdebstrap", "nsenter", "unshare") if shutil.which(name) is None]
    if os.geteuid() != 0:
        return "a machine of its own needs root"
    if absent:
        return f"a machine of its own needs {', '.join(absent)}: sudo apt-get install mmdebstrap systemd-container"
    if not LEASH:
        return "a machine of its own needs setpriv, so that it ends with the tests"
    tried = subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"no namespaces may be made here: {tried.stderr.strip()}"


def root_file_system() -> Path:
    """The folder with the root file system that machines start from; made if it is not there."""
    key = hashlib.sha256(repr((SUITE, PACKAGES, _PREPARED)).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fieldfare"
    cache.mkdir(parents=True, exist_ok=True)
    root = cache / f"rootfs-{SUITE}-{key}"
    with (cache / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            half = cache / f"{root.name}.new"
            shutil.rmtree(half, ignore_errors=True)
            hooks = [f"--customize-hook={line}" for line in _PREPARED]
            command = ["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}", *hooks]
            made = subprocess.run([*LEASH, *command, SUITE, str(half)], capture_output=True, text=True)
            assert made.returncode == 0, made.stderr[-4000:]
            half.rename(root)
    return root


class Wire:
    """A network that machines can share: a loopback interface and nothing else."""

    def __init__(self) -> None:
        self._holder = _hold("--net")
        self.path = Path(f"/proc/{self._holder.pid}/ns/net")
        subprocess.run(["nsenter", f"--net={self.path}", "ip", "link", "set", "lo", "up"], check=True)

    def end(self) -> None:
        """Take it away; the machines on it have ended."""
        self._holder.kill()
        self._holder.wait()


class Machine:
    """One machine, off at first. Used as a context it boots at once and ends with it."""

    def __init__(self, name: str = "machine", wire: Wire | None = None, lend: Mapping[Path, str] | None = None) -> None:
        """`lend`: folders and files of this host by the path at which the machine sees them, read-only."""
        self.name = name
        self._wire, self._lent = wire, dict(lend or {})
        self._holder = _hold("--mount", "--propagation", "private")
        self._container: subprocess.Popen[bytes] | None = None
        self.groups: list[Path] = []
        """Its control groups, one in each hierarchy; none before it was switched on."""

        base = root_file_system()
        # Below a tmpfs, so that not even empty folders are left on this machine.
        self._inside(
            "mount -t tmpfs tmpfs /run && mount -t tmpfs -o size=75% tmpfs /mnt"
            " && mkdir /mnt/upper /mnt/work /mnt/root"
            f" && mount -t overlay -o lowerdir={base},upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/root"
        )
        if wire is not None:  # by a name that does not depend on who sees which processes
            self._inside(f"touch /mnt/wire && mount --bind {wire.path} /mnt/wire")
        self.disk = Path(f"/proc/{self._holder.pid}/root/mnt/root")
        """The machine's root directory as this process can reach it, on or off. Absolute links in it lead astray."""

        self.write("/etc/hostname", f"{name}\n")
        self.write("/etc/hosts", f"127.0.0.1 localhost {name}\n")

    # -- power ---------------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Switch it on; returns when systemd has started everything."""
        assert self._container is None
        network = "--private-network" if self._wire is None else "--network-namespace-path=/mnt/wire"
        lent = [f"--bind-ro={source}:{target}" for source, target in self._lent.items()]
        # In a namespace of processes that ends with its first: nspawn alone, killed, would leave the machine running.
        command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command += ["systemd-nspawn", "--register=no", "--keep-unit", "--quiet", "--directory=/mnt/root", "--boot"]
        command += [f"--machine={self.name}", "--console=pipe", "--link-journal=no", network, *lent]
        self.groups = _groups(f"fieldfare-{self._holder.pid}")
        inside = 'for group; do [ "$group" != -- ] || break; echo $$ >"$group/cgroup.procs"; shift; done; shift'
        enter = ["sh", "-ec", f'{inside}; exec "$@"', "sh", *map(str, self.groups), "--"]
        self._container = subprocess.Popen(
            [*LEASH, *enter, "nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._booted()

    def _booted(self) -> None:
        until(lambda: self.first_process, f"a first process of {self.name}", 60.0)

        def up() -> bool | None:
            state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
            return True if state in ("running", "degraded") else None

        until(up, f"the start of {self.name}", 60.0)
        for name in _CONTROLLERS:  # makes limits real where this host has the old hierarchies, read-only until now
            self.run("sh", "-c", f"mount -o remount,rw,bind /sys/fs/cgroup/{name} 2>/dev/null || true")
        self.run("systemctl", "daemon-reexec")  # which is when systemd looks what it can limit

    def reboot(self) -> None:
        """Restart it in order; returns when it is up again."""
        assert self._container is not None
        self.run("systemctl", "reboot", check=False)
        assert self._container.wait(90.0) == _WANTS_REBOOT
        self._container = None
        self.boot()

    def power_off(self) -> None:
        """Shut it down in order; the disk stays."""
        assert self._container is not None
        self.run("systemctl", "poweroff", check=False)
        self._container.wait(90.0)
        self._container = None

    def pull_the_plug(self) -> None:
        """Everything that runs in it is gone at once; the disk stays."""
        assert self._container is not None
        first = self.first_process
        if first is not None:
            os.kill(first, signal.SIGKILL)
        self._container.kill()
        self._container.wait()
        self._container = None

    def end(self) -> None:
        """Take it away, with its disk."""
        if self._container is not None:
            self.pull_the_plug()
        self._holder.kill()
        self._holder.wait()
        _remove(self.groups)

    def __enter__(self) -> Self:
        try:
            self.boot()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    # -- what can be done to it ----------------------------------------------------------------------------------

    def run(
        self, *command: str, check: bool = True, timeout: float = 60.0, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root in it; AssertionError with what it said if it fails and `check` is on."""
        ran = subprocess.run(
            self._entered(command), capture_output=True, text=True, timeout=timeout, input=stdin or "", check=False
        )
        assert ran.returncode == 0 or not check, f"{' '.join(command)}: {ran.returncode}\n{ran.stdout}{ran.stderr}"
        return ran

    def shell(self, script: str, check: bool = True, timeout: float = 60.0) -> str:
        """Run a script with bash, errors on; returns its output."""
        return self.run("bash", "-euo", "pipefail", "-c", script, check=check, timeout=timeout).stdout

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a command as root in it, and let it run; it ends with the machine."""
        return subprocess.Popen(self._entered(command), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def copy_in(self, source: Path, target: str) -> None:
        """Copy a file or a folder of this host to an absolute path, with root as its owner."""
        place = self.disk / target.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place, dirs_exist_ok=True)
        else:
            shutil.copy(source, place)
        for path in [place, *(place.rglob("*") if place.is_dir() else [])]:
            os.chown(path, 0, 0)

    def write(self, target: str, text: str, mode: int = 0o644) -> None:
        """Write a file of it."""
        place = self.disk / target.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        place.chmod(mode)

    def read(self, path: str) -> str:
        """Read a file of it."""
        return self.run("cat", path).stdout

    def exists(self, path: str) -> bool:
        """Whether there is such a file or folder."""
        return self.run("test", "-e", path, check=False).returncode == 0

    def drop_in(self, unit: str, name: str, text: str) -> None:
        """Change a unit as `systemctl edit` would; it takes effect when the unit starts next."""
        self.write(f"/etc/systemd/system/{unit}.d/{name}.conf", text)
        self.run("systemctl", "daemon-reload")

    def fake_power(self, unit: str, online: bool = True) -> "Power":
        """Have a unit see a mains adapter that `Power.set` plugs in and out, without a restart."""
        power = Power(self)
        power.set(online)
        self.drop_in(unit, "power", "[Service]\nBindReadOnlyPaths=/srv/power:/sys/class/power_supply\n")
        return power

    # -- what can be seen of it ----------------------------------------------------------------------------------

    def show(self, unit: str, key: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={key}", unit).stdout.strip()

    def journal(self, unit: str, **fields: str | int) -> list[dict[str, Any]]:
        """What a unit has logged, oldest first, as the journal keeps it; only what has these fields."""
        matches = [f"{name}={value}" for name, value in fields.items()]
        self.run("journalctl", "--sync", check=False)
        ran = self.run("journalctl", "--unit", unit, "--output=json", "--no-pager", "--all", *matches)
        return [json.loads(line) for line in ran.stdout.splitlines()]

    def wait_journal(self, unit: str, seconds: float = 60.0, **fields: str | int) -> dict[str, Any]:
        """The newest line of a unit with these fields, as soon as there is one."""
        deadline = time.monotonic() + seconds
        while True:
            if found := self.journal(unit, **fields):
                return found[-1]
            if time.monotonic() > deadline:
                said = "\n".join(str(line.get("MESSAGE")) for line in self.journal(unit)[-40:])
                raise AssertionError(f"{unit} did not log {fields} within {seconds:g} s:\n{said}")
            time.sleep(0.1)

    # -- the container -------------------------------------------------------------------------------------------

    def _entered(self, command: Sequence[str]) -> list[str]:
        first = self.first_process
        assert first is not None, f"{self.name} is off"
        clean = ["env", "-i", f"PATH={_PATH}", "HOME=/root", "LANG=C.UTF-8", "DEBIAN_FRONTEND=noninteractive"]
        return [*LEASH, "nsenter", f"--target={first}", "--all", "--root", "--wd", *clean, *command]

    @property
    def first_process(self) -> int | None:
        """PID 1 of the machine, by its number here."""
        if self._container is None or self._container.poll() is not None:
            return None
        with contextlib.suppress(OSError, ValueError):
            first = str(self._container.pid)
            for _ in ("nspawn", "systemd"):
                (first,) = Path(f"/proc/{first}/task/{first}/children").read_text().split()
            # Before it is systemd it is nspawn, whose namespaces are not all made yet.
            if Path(f"/proc/{first}/comm").read_text().strip() == "systemd":
                return int(first)
        return None

    def _inside(self, script: str) -> None:
        command = ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt", "sh", "-ec", script]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr


class Power:
    """A machine's mains adapter."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        machine.write("/srv/power/AC/type", "Mains\n")

    def set(self, online: bool) -> None:
        """Plug it in or pull it."""
        self._machine.write("/srv/power/AC/online", f"{int(online)}\n")


def _groups(name: str) -> list[Path]:
    """A control group of its own below ours in every hierarchy, so that two machines never share a unit's."""
    ours = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    made = []
    for words in (line.split() for line in Path("/proc/self/mounts").read_text().splitlines()):
        if words[2] not in ("cgroup", "cgroup2"):
            continue
        options = {option.removeprefix("name=") for option in words[3].split(",")} if words[2] == "cgroup" else {""}
        for _, controllers, path in ours:
            here = Path(words[1] + path.rstrip("/"))
            if controllers.removeprefix("name=").split(",")[0] not in options or not here.is_dir():
                continue
            for old in here.glob("fieldfare-*"):  # of tests that were killed
                if not Path(f"/proc/{old.name.removeprefix('fieldfare-')}").exists():
                    _empty(old)
            (here / name).mkdir(exist_ok=True)
            if (here / "cpuset.cpus").exists():  # it takes no process until somebody says which CPUs are its own
                for file in ("cpuset.cpus", "cpuset.mems"):
                    (here / name / file).write_text((here / file).read_text())
            made.append(here / name)
    return made


def _remove(groups: Sequence[Path]) -> None:
    """Take control groups away whose processes are ending, with all below them."""

    def gone() -> bool | None:
        for group in groups:
            _empty(group)
        return True if not any(group.exists() for group in groups) else None

    until(gone, "the end of the control groups")


def _empty(group: Path) -> None:
    for folder, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):  # somebody lives there still
            os.rmdir(folder)


def _hold(*namespaces: str) -> subprocess.Popen[bytes]:
    """A process that keeps new namespaces open until it is killed, or the tests end."""
    holder = subprocess.Popen(
        [*LEASH, "unshare", *namespaces, "sh", "-c", "echo ready; exec sleep infinity"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert holder.stdout is not None
    with holder.stdout as said:
        assert said.readline() == b"ready\n"
    return holder
