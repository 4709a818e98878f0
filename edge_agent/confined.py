"""Shuts this process in and makes a trainer of it: `python -m edge_agent.confined`, started by edge_agent.child.

All limits hold before torch is imported, which alone takes two seconds of a CPU and starts threads: from here on the
process dies with the agent, comes last for CPU and disk, is bounded in memory, and is the kernel's first choice when
memory runs out. Only the standard library is imported before that.
"""

import argparse
import contextlib
import ctypes
import os
import resource
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30}
"""Number of the system call, for which glibc has no function."""
_IDLE_IO = 3 << 13
"""ioprio of the idle class: the disk when nobody else wants it."""


def main() -> None:
    """Serve jobs until stdin ends; the exit status is 0 then, 1 with a traceback on stderr after an error of ours."""
    options = argparse.ArgumentParser(prog="trainer", description="Started by edge-agent, not by hand.")
    options.add_argument("--parent", type=int, required=True, help="process id; without it the trainer ends")
    options.add_argument("--memory-max", type=int, default=0, help="bytes of private memory, 0 for any")
    options.add_argument("--nice", type=int, default=0, help="added to the scheduling priority")
    options.add_argument("--idle", action="store_true", help="take CPU and disk only when nobody else wants them")
    options.add_argument("--cgroup", type=Path, help="the control group to live in")
    options.add_argument("--trial", action="store_true", help="only try what training needs")
    given = options.parse_args()
    if not _confine(given.parent, given.memory_max, given.nice, given.idle, given.cgroup):
        return
    if given.trial:
        from edge_agent import trial

        trial.main()
    else:
        from edge_agent import trainer

        trainer.serve()


def _confine(parent: int, memory_max: int, nice: int, idle: bool, cgroup: Path | None) -> bool:
    """Die with the parent, and stay within limits; False if the parent is gone already."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != parent:
        return False
    if cgroup is not None:
        # First, so that all that is allocated from here on counts there.
        with contextlib.suppress(OSError), open(cgroup / "cgroup.procs", "wb", buffering=0) as file:
            file.write(b"0")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold data
    if memory_max:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_max, memory_max))
    os.nice(nice)
    with contextlib.suppress(OSError):
        # Where no control group does, the kernel shares the CPU among sessions first (autogroup), and this process is a
        # session of its own: its niceness would count among its own threads alone.
        Path("/proc/self/autogroup").write_text("19" if idle else str(nice))
    if idle:
        # A sandbox may forbid either, and niceness is left then.
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        if (number := _IOPRIO_SET.get(os.uname().machine)) is not None:
            libc.syscall(number, 1, 0, _IDLE_IO)
    with contextlib.suppress(OSError):
        # Short of memory, the kernel should end this process and not the agent.
        Path("/proc/self/oom_score_adj").write_text("500")
    return True


if __name__ == "__main__":
    main()
