"""What the kernel says of a process: CPU seconds, memory, wake-ups. Linux; it reads /proc and nothing else."""

import os
import re
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time of all its threads, ended ones too; steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def machine_busy() -> float:
    """CPU seconds that the whole machine has worked since it started."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    idle, waiting = fields[3], fields[4]
    return (sum(fields[:8]) - idle - waiting) / _TICK


def cpu_exact(pid: int) -> float:
    """CPU time of the threads it has now, to the nanosecond."""
    return sum(int(line.split()[0]) for line in _each_thread(pid, "schedstat")) / 1e9


def wake_ups(pid: int) -> int:
    """How often its threads have gone to sleep by themselves, which is how often they were woken."""
    found = (
        re.search(r"^voluntary_ctxt_switches:\s+(\d+)", text, re.MULTILINE) for text in _each_thread(pid, "status")
    )
    return sum(int(match[1]) for match in found if match)


def resident(pid: int) -> float:
    """Resident memory in MB (10^6 bytes): private, shared and file pages."""
    return _status(pid, "VmRSS")


def resident_peak(pid: int) -> float:
    """The highest resident memory so far, in MB."""
    return _status(pid, "VmHWM")


def children(pid: int) -> list[int]:
    """Its child processes."""
    return [int(child) for text in _each_thread(pid, "children") for child in text.split()]


def _status(pid: int, name: str) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    match = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    if match is None:
        raise ProcessLookupError(f"process {pid} has ended")
    return int(match[1]) * 1024 / 1e6


def _each_thread(pid: int, file: str) -> list[str]:
    found = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        try:
            found.append((thread / file).read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended between the two calls
    return found
