"""A real daemon as a child process, and its log as a test reads it: JSON lines and nothing else."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar

Line = dict[str, Any]
T = TypeVar("T")
PATIENCE = 30.0
"""Seconds that anything may take on a busy machine."""
LEASH = [found, "--pdeathsig", "KILL", "--"] if (found := shutil.which("setpriv")) else []
"""Before a command: it dies with the tests, whatever ends those, where the system can promise it."""


def until(found: Callable[[], T | None], what: str, seconds: float = PATIENCE) -> T:
    """The first result that is not None; AssertionError names what never came."""
    end = time.monotonic() + seconds
    while True:
        result = found()
        if result is not None:
            return result
        assert time.monotonic() < end, f"{what} did not come within {seconds:g} s"
        time.sleep(0.005)


def memory(pid: int, what: Literal["VmHWM", "VmRSS"]) -> int:
    """The most resident memory that a process has had so far, or what it has now, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not say")


MEMORY = 250 << 20
"""Bytes that no daemon with small models may need, however bad its input: a link takes messages of up to 64 MiB."""


class Child(Protocol):
    """What a daemon needs to know of its process: a subprocess.Popen."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, number: int, /) -> None: ...
    def kill(self) -> None: ...


class Daemon:
    """`aggregator run` or `edge-agent run` with its log in a file beside the configuration.

    Used as a context it is killed at the end if it still runs then: the end of a test that failed.
    """

    def __init__(self, package: Literal["aggregator", "edge_agent"], config: Path, clock: Path | None = None) -> None:
        """`clock`: the file that says how far its wall clock is off; see tests.hostile.clock."""
        self.log = config.with_suffix(".log")
        module = [f"{package}.cli"] if clock is None else ["tests.hostile.clock", str(clock), package]
        self._command = [*LEASH, sys.executable, "-m", *module, "run", "--config", str(config)]
        self._child: Child | None = None
        self._offset, self._rest = 0, b""
        self.lines: list[Line] = []
        self.memory_max = MEMORY

    @property
    def pid(self) -> int:
        """Its process id; AssertionError if it does not run any more."""
        assert self._child is not None and self._child.poll() is None, f"the daemon has died:\n{self._tail()}"
        return self._child.pid

    def check(self) -> None:
        """AssertionError if it has ended and nobody killed it."""
        assert self._child is None or self.pid

    def start(self) -> None:
        """Start it; what it logs before the broker answers is there soon."""
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def stop(self, by: signal.Signals = signal.SIGTERM) -> int:
        """End it as systemd would; its exit status. Whatever it was sent, it needed no more than memory_max."""
        assert self._child is not None
        assert self._child.poll() is not None or self.peak() < self.memory_max
        self._child.send_signal(by)
        return self.ended()

    def ended(self) -> int:
        """The exit status of one that was told to end."""
        assert self._child is not None
        try:
            return self._child.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """End it as a power cut would; nothing happens if it does not run."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def read(self) -> list[Line]:
        """All lines so far; a line that is no JSON object (a traceback) fails the test."""
        with self.log.open("rb") as log:
            log.seek(self._offset)
            fresh = log.read()
        self._offset += len(fresh)
        *whole, self._rest = (self._rest + fresh).split(b"\n")
        for text in whole:
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            assert isinstance(line, dict), f"not a line of the log:\n{self._tail()}"
            self.lines.append(line)
        return self.lines

    def wait(self, event: str, since: int = 0, **fields: object) -> Line:
        """The first line of this event, with these fields, after the first `since` lines."""

        def found() -> Line | None:
            for line in self.read()[since:]:
                if line["event"] == event and all(line.get(name) == value for name, value in fields.items()):
                    return line
            assert self.pid
            return None

        return until(found, f"{event} {fields}")

    def peak(self) -> int:
        """The most memory that it has had so far, in bytes."""
        return memory(self.pid, "VmHWM")

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
