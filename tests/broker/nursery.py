"""Many agents on a small machine: `edge-agent run` in processes that are forked from one that has imported it already.

A start of the command takes 0.7 s of a CPU, most of it imports; a fork takes 20 ms. What runs in the fork is the
command itself, in a process of its own that can be killed like any other.

    nursery: a line (configuration, log) on stdin -> a process, its id on stdout; end of stdin -> end of all
"""

import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.hostile.daemon import LEASH, Daemon

ROOT = Path(__file__).parents[2]
_PR_SET_PDEATHSIG = 1


class Sprout:
    """A forked agent: what tests.hostile.daemon.Daemon wants of a child. Its exit status stays the nursery's secret."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        # It is nobody's child here, and a number may soon be another's.
        self._handle = os.pidfd_open(pid)
        self._status: int | None = None

    def poll(self) -> int | None:
        """None while it runs."""
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Return when it has ended; subprocess.TimeoutExpired."""
        status = self._ended(timeout)
        if status is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("edge-agent", timeout)
        return status

    def send_signal(self, number: int) -> None:
        """No effect on one that has ended."""
        if self.poll() is None:
            signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> None:
        """As a power cut."""
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> int | None:
        if self._status is None and select.select([self._handle], [], [], timeout)[0]:
            os.close(self._handle)
            self._status = 0
        return self._status


class Nursery:
    """The process that forks. Its end, and the end of the tests, is the end of every agent that came of it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [*LEASH, sys.executable, "-m", "tests.broker.nursery"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def fork(self, config: Path, log: Path) -> Sprout:
        """A new agent."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([str(config), str(log)]), file=self._process.stdin, flush=True)
        return Sprout(int(self._process.stdout.readline()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


class Forked(Daemon):
    """`edge-agent run`, forked."""

    def __init__(self, nursery: Nursery, config: Path) -> None:
        super().__init__("edge_agent", config)
        self._nursery, self._config = nursery, config

    def start(self) -> None:
        """Fork one; the one before has ended."""
        self._child = self._nursery.fork(self._config, self.log)


def main() -> None:
    """Fork until stdin ends."""
    sys.modules.setdefault("rich", None)  # type: ignore[arg-type]  # as the command does, before it imports the rest
    from edge_agent import cli, service  # noqa: F401 - what every child needs, once

    prctl = ctypes.CDLL(None).prctl
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    gc.collect()
    gc.freeze()
    while line := sys.stdin.readline():
        config, log = json.loads(line)
        pid = os.fork()
        if pid:
            sys.stdout.write(f"{pid}\n")
            sys.stdout.flush()
            continue
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        nowhere, file = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        for source, target in ((nowhere, 0), (file, 1), (file, 2)):
            os.dup2(source, target)
        os.closerange(3, 64)
        status = 1
        try:
            status = cli.main(["run", "--config", config])
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


if __name__ == "__main__":
    main()
