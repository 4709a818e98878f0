"""The agent's side of its trainer child: start it, give it jobs, freeze it, end it, and tell the owner what it says.

start -> (submit -> TrainerSaid ... )* -> stop, crash or kill -> TrainerExited, exactly once for every start.

Nothing here waits: pipes are written and read by threads that only post events. The child gets no secret, neither by
environment nor by pipe; it dies with the agent (PR_SET_PDEATHSIG, and the end of its stdin). This module must never
import torch or numpy.
"""

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Literal

from edge_agent import jobs
from edge_agent.jobs import Cancel, Job, Judge, Order, Suspend, Word
from edge_agent.sandbox import Sandbox
from shared.errors import RemoteProtocolError, TrainingError

Cause = Literal["stopped", "exited", "crashed", "killed", "out_of_memory", "garbled"]

_LINE_MAX = 1_000
_PASSED_ON: Final = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")
"""Of the agent's environment, what the child may see."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run the child. `memory_max` in bytes bounds its private memory, 0 does not; `grace` is in seconds."""

    python: str = sys.executable
    threads: int = 1
    memory_max: int = 2 << 30
    nice: int = 10
    idle: bool = False
    """Whether it gets CPU and disk only when nobody else wants them."""
    grace: float = 5.0
    """From the request to stop until SIGKILL."""


@dataclass(frozen=True, slots=True)
class TrainerSaid:
    """A message of the child with this process id."""

    pid: int
    message: Word


@dataclass(frozen=True, slots=True)
class TrainerWrote:
    """A line on the child's stderr, cut to 1,000 characters: for the log."""

    pid: int
    line: str


@dataclass(frozen=True, slots=True)
class TrainerExited:
    """The child is gone, and everything of its process group with it.

    stopped: we ended it. exited: by itself, in order. crashed: an error of ours, or a signal. killed: SIGKILL that we
    did not send. out_of_memory: the same, and its control group says it was for want of memory. garbled: it broke
    the protocol, so we killed it.
    """

    pid: int
    cause: Cause
    code: int | None
    """Exit status, when it exited."""
    signal: int | None
    """Signal number, when one ended it."""


Event = TrainerSaid | TrainerWrote | TrainerExited


class Trainer:
    """At most one child at a time; every method is called by the owner's thread and returns at once."""

    def __init__(self, post: Callable[[Event], None], settings: Settings, sandbox: Sandbox | None = None) -> None:
        self._post, self._settings, self._sandbox = post, settings, sandbox
        self._child: _Child | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id, or None when there is none or it has ended."""
        return self._child.pid if self._child is not None and not self._child.gone else None

    @property
    def frozen(self) -> bool:
        """Whether the child is stopped by freeze()."""
        return self.pid is not None and self._child is not None and self._child.frozen

    def start(self) -> int:
        """Start a child, unless there is one, and give its process id; TrainingError("trainer") if it cannot start.

        One that was told to stop does not count, so its TrainerExited may follow the start of the next.
        The calling thread must live as long as the child may: when it ends, the kernel ends the child.
        """
        if self._child is None or self._child.gone or self._child.stopping:
            self._child = _Child(self._post, self._settings, self._sandbox)
        return self._child.pid

    def submit(self, job: Job | Judge) -> int:
        """Queue a job, starting a child if need be, and give the process id of the child that has it.

        If that child has just ended, its TrainerExited is the answer. TrainingError("trainer") if none can start.
        """
        pid = self.start()
        assert self._child is not None
        self._child.orders.put(jobs.frame(Order(job)))
        return pid

    def cancel(self, id: str) -> None:
        """Have the child drop this job, before it starts or between two of its batches, and stay warm for the next.

        Its answer is Failed("cancelled"), or Done with the body at its `output` if it was at its end; until then the
        child is at work. No effect without a child, nor for a job that is unknown or finished.
        """
        if self._child is not None:
            self._child.orders.put(jobs.frame(Order(Cancel(id))))

    def suspend(self, id: str) -> None:
        """Have the child leave this job at its next batch with a checkpoint; a frozen child is let run for it.

        Its answer is Suspended, or Done if it was at its end. No effect without a child, nor for an unknown job.
        """
        if self._child is not None:
            self._child.orders.put(jobs.frame(Order(Suspend(id))))
            self._child.freeze(False)

    def stop(self, kill: bool = False) -> None:
        """End the child: no more jobs, then SIGTERM, then SIGKILL; with `kill` SIGKILL at once. No child, no effect."""
        if self._child is not None:
            self._child.stop(kill)

    def freeze(self) -> None:
        """Stop the child where it stands, its memory kept: its control group, or by SIGSTOP where there is none."""
        if self._child is not None:
            self._child.freeze(True)

    def thaw(self) -> None:
        """Let it run on."""
        if self._child is not None:
            self._child.freeze(False)

    def rss(self) -> int | None:
        """Resident bytes of the child, or None when there is none."""
        return None if self.pid is None else rss(self.pid)


def rss(pid: int) -> int | None:
    """Resident bytes of a process, or None when it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


class _Child:
    """One process with the threads that write to it, listen to it and wait for its end."""

    def __init__(self, post: Callable[[Event], None], settings: Settings, sandbox: Sandbox | None) -> None:
        self._post, self._settings, self._sandbox = post, settings, sandbox
        self._lock = threading.Lock()
        self.stopping = self._killed = self._garbled = False
        self._ended = threading.Event()
        self.frozen = False
        self._oom_kills = 0
        self.orders: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        command = [settings.python, "-P", "-m", "edge_agent.confined"]
        options = [f"--parent={os.getpid()}", f"--memory-max={settings.memory_max}", f"--nice={settings.nice}"]
        options += ["--idle"] if settings.idle else []
        if sandbox is not None:
            sandbox.freeze(False)  # one that was killed while it was frozen left the group so
            self._oom_kills = sandbox.oom_kills
            options.append(f"--cgroup={sandbox.trainer}")
        try:
            self._process = subprocess.Popen(
                [*command, *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_environment(settings),
                cwd="/",
                close_fds=True,
                start_new_session=True,
            )
        except OSError as error:
            raise TrainingError("trainer", f"{settings.python}: {error.strerror}") from None
        self.pid: Final = self._process.pid
        self._listeners = [_thread(self._read), _thread(self._forward)]
        _thread(self._write)
        _thread(self._wait)

    @property
    def gone(self) -> bool:
        """Whether the process has ended."""
        return self._ended.is_set()

    def stop(self, kill: bool) -> None:
        self.orders.put(None)
        with self._lock:
            first, self.stopping = not self.stopping, True
        if kill:
            self._kill()
        elif first:
            _thread(self._end)

    def freeze(self, frozen: bool) -> None:
        with self._lock:
            if self._ended.is_set():
                return
            # A child that could not join its group would run on while that is frozen.
            box = self._sandbox
            grouped = box is not None and box.holds(self.pid) and box.freeze(frozen)
            if grouped or self._signal(signal.SIGSTOP if frozen else signal.SIGCONT):
                self.frozen = frozen

    def _end(self) -> None:
        # An idle child leaves by itself when its stdin closes; one at work is told so.
        if self._ended.wait(min(0.5, self._settings.grace / 2)):
            return
        with self._lock:
            self._signal(signal.SIGTERM)
        self.freeze(False)  # what is frozen cannot even die of SIGTERM
        if not self._ended.wait(self._settings.grace):
            self._kill()

    def _kill(self) -> None:
        with self._lock:
            self._killed = self._signal(signal.SIGKILL) or self._killed

    def _signal(self, number: int) -> bool:
        """Signal the group, with the lock held: its number stays ours until _wait has reaped the child."""
        if self._ended.is_set():
            return False
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def _write(self) -> None:
        assert self._process.stdin is not None
        try:
            with self._process.stdin as stdin:
                while (order := self.orders.get()) is not None:
                    stdin.write(order)
                    stdin.flush()
        except OSError:
            return  # it has ended; _wait tells

    def _forward(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            for line in _lines(stderr):
                self._post(TrainerWrote(self.pid, line))

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            with self._process.stdout as stdout:
                while (message := jobs.read_said(stdout)) is not None:
                    self._post(TrainerSaid(self.pid, message))
        except RemoteProtocolError as error:
            self._garbled = True
            self._post(TrainerWrote(self.pid, f"broke the protocol: {error}"[:_LINE_MAX]))
            self._kill()

    def _wait(self) -> None:
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            # Until it is reaped its number is not given away, so this can only reach what it left behind.
            self._signal(signal.SIGKILL)
        for listener in self._listeners:
            listener.join(1.0)  # its last words come before the news of its end
        with self._lock:
            status = self._process.wait()
            self._ended.set()
        self.orders.put(None)
        code, number = (status, None) if status >= 0 else (None, -status)
        self._post(TrainerExited(self.pid, self._cause(code, number), code, number))

    def _cause(self, code: int | None, number: int | None) -> Cause:
        if self._garbled:
            return "garbled"
        if self.stopping and (code == 0 or self._killed or number == signal.SIGTERM):
            return "stopped"
        if code == 0:
            return "exited"
        if number != signal.SIGKILL:
            return "crashed"
        starved = self._sandbox is not None and self._sandbox.oom_kills > self._oom_kills
        return "out_of_memory" if starved else "killed"


def _thread(run: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=run, name=f"trainer{run.__name__}", daemon=True)
    thread.start()
    return thread


def _environment(settings: Settings) -> dict[str, str]:
    found = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    threads = str(settings.threads)
    found |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    code = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if settings.python == sys.executable:
        # The very code that runs here, also when it is run from a checkout that is not installed.
        code.insert(0, str(Path(__file__).resolve().parent.parent))
    if code:
        found["PYTHONPATH"] = os.pathsep.join(code)
    return found


def _lines(stream: IO[bytes]) -> Iterator[str]:
    """The lines of a stream, each cut to _LINE_MAX characters; memory stays bounded without any line end too."""
    while piece := stream.readline(_LINE_MAX):
        yield piece.decode("utf-8", "replace").rstrip()
        while piece and not piece.endswith(b"\n"):
            piece = stream.readline(_LINE_MAX)
