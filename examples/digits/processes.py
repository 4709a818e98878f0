"""The demo's processes: each with a log file, each ended with the demo, whatever ends that.

The kernel kills them when the demo dies (setpriv --pdeathsig), so that not even `kill -9` leaves one behind.
"""

import os
import shutil
import signal
import subprocess
import sysconfig
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

from aggregator.broker import Broker
from shared.errors import FieldfareError

GRACE = 10.0
"""Seconds for an orderly end."""

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that end a demo."""

LINES = 8
"""Of a log, shown when its process ends early."""


class DemoError(FieldfareError):
    """The demo cannot go on; the text says why."""


def program(name: str) -> str:
    """An installed command of Fieldfare."""
    path = Path(sysconfig.get_path("scripts"), name)
    if not path.exists():
        raise DemoError(f"{path} is missing; run: make setup")
    return str(path)


def command(name: str, *arguments: str | Path) -> None:
    """Run one command of Fieldfare to its end; DemoError with its last word where it fails."""
    ran = subprocess.run(
        [*_leash(), program(name), *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=_environment(),
    )
    if ran.returncode:
        said = ran.stderr.strip().splitlines() or ["no word why"]
        raise DemoError(f"`{name} {arguments[0]} {arguments[1]}` failed (exit {ran.returncode}): {said[-1]}")


class Process:
    """A daemon that appends its log to `log`."""

    def __init__(self, name: str, log: Path, arguments: list[str]) -> None:
        self.name, self.log, self._arguments = name, log, arguments
        self._killed = False
        with log.open("ab") as stream:
            # A session of its own: Ctrl-C reaches the demo alone, which then ends all in good order.
            self._popen = subprocess.Popen(
                [*_leash(), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=_environment(),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._popen.pid

    def check(self) -> None:
        """DemoError with the end of its log if it has ended by itself."""
        status = self._popen.poll()
        if status is not None and not self._killed:
            how = f"exit status {status}" if status >= 0 else f"signal {-status}"
            raise DemoError(f"{self.name} ended early ({how}); {end_of(self.log)}")

    def kill(self) -> None:
        """SIGKILL, as a power cut would end it."""
        self._killed = True
        self._popen.kill()
        self._popen.wait()

    def again(self) -> "Process":
        """The same daemon, started once more."""
        return Process(self.name, self.log, self._arguments)

    def ask_to_end(self) -> None:
        """SIGTERM."""
        self._popen.terminate()

    def wait(self, until: float) -> None:
        """Wait for its end until the monotonic second `until`, then kill it."""
        try:
            self._popen.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()


class Processes:
    """The broker, the aggregator and the agents; leaving it ends them, agents first."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.aggregator: Process | None = None
        self.agents: list[Process] = []

    def check(self) -> None:
        """DemoError if one has ended."""
        if self.broker.pid is None:
            raise DemoError(f"mosquitto ended early; {end_of(self.broker.log)}")
        for process in [*self.agents, *([self.aggregator] if self.aggregator else [])]:
            process.check()

    def stop(self) -> None:
        """End all that still run."""
        for group in (self.agents, [self.aggregator] if self.aggregator else []):
            for process in group:
                process.ask_to_end()
            until = time.monotonic() + GRACE
            for process in group:
                process.wait(until)
        self.broker.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A second Ctrl-C must not cut this short.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING}
        self.stop()
        for number, action in before.items():
            signal.signal(number, action)


def end_of(log: Path) -> str:
    """The last lines of a log, for the end of a message."""
    with log.open(errors="replace") as stream:
        lines = [line.rstrip()[:400] for line in deque(stream, LINES)]
    return f"the end of {log}:" + "".join(f"\n  {line}" for line in lines)


def _leash() -> list[str]:
    found = shutil.which("setpriv")
    return [found, "--pdeathsig", "KILL", "--"] if found else []


def _environment() -> dict[str, str]:
    """Ours, without what would change a daemon's settings or make it believe that systemd started it."""
    foreign = ("FIELDFARE_", "NOTIFY_", "WATCHDOG_", "JOURNAL_", "LISTEN_")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
