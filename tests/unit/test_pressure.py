"""edge_agent.pressure: the kernel's triggers call the owner, seldom, and where there are none that is said."""

import errno
import hashlib
import os
import queue
import threading
import time
from pathlib import Path

import pytest

from edge_agent import pressure
from edge_agent.pressure import PressureWatch

LIMITS = {"cpu": 20.0, "memory": 10.0, "io": 30.0}
KERNEL = Path("/proc")


def granted() -> bool:
    """Whether this kernel gives this process a trigger."""
    try:
        os.close(pressure._trigger(KERNEL / "pressure" / "cpu", 50.0))
    except OSError:
        return False
    return True


needs_triggers = pytest.mark.skipif(not granted(), reason="this kernel grants no PSI trigger")


@needs_triggers
def test_the_real_kernel_calls() -> None:
    """A trigger that any waiting fires calls from a thread of its own, within a window while there is load."""
    calls: queue.SimpleQueue[str] = queue.SimpleQueue()
    watch = PressureWatch(KERNEL, {"cpu": 0.0}, lambda: calls.put(threading.current_thread().name), rest=600.0)
    assert not watch.watching
    ended = threading.Event()
    spinners = [threading.Thread(target=_spin, args=(ended,)) for _ in range(2)]
    watch.start()
    assert watch.watching, watch.refusal
    for each in spinners:
        each.start()
    try:
        assert calls.get(timeout=60) == "pressure"
    finally:
        ended.set()
        watch.stop()
    assert not watch.watching


def _spin(ended: threading.Event) -> None:
    while not ended.is_set():
        hashlib.pbkdf2_hmac("sha256", b"load", b"load", 100_000)  # without the interpreter's lock


@needs_triggers
def test_pressure_that_stays_high_calls_once_in_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in every window, which has 2 s here: between two calls the trigger is not listened to."""
    monkeypatch.setattr(pressure, "WINDOW_US", 2_000_000)
    calls: queue.SimpleQueue[float] = queue.SimpleQueue()
    watch = PressureWatch(KERNEL, {"cpu": 0.0}, lambda: calls.put(time.monotonic()), rest=5.0)
    ended = threading.Event()
    spinners = [threading.Thread(target=_spin, args=(ended,)) for _ in range(2)]
    watch.start()
    for each in spinners:
        each.start()
    try:
        first, second = calls.get(timeout=60), calls.get(timeout=60)
    finally:
        ended.set()
        watch.stop()
    assert second - first >= 5.0


@needs_triggers
def test_it_ends_at_once_and_leaves_nothing_open() -> None:
    """The thread is asleep for ever, and still ends when it is told to; it can be started once more."""
    before = set(os.listdir("/proc/self/fd"))
    watch = PressureWatch(KERNEL, dict.fromkeys(LIMITS, 99.9), lambda: None)
    for _ in range(2):
        watch.start()
        assert watch.watching
        assert any(thread.name == "pressure" for thread in threading.enumerate())
        watch.stop()
    assert not any(thread.name == "pressure" for thread in threading.enumerate())
    assert set(os.listdir("/proc/self/fd")) <= before


def test_nothing_limited_is_nothing_to_watch() -> None:
    """A policy without limits is not kept awake for the want of triggers."""
    watch = PressureWatch(Path("/nowhere"), dict.fromkeys(LIMITS, 100.0), lambda: None)
    watch.start()
    assert watch.watching
    assert not any(thread.name == "pressure" for thread in threading.enumerate())
    watch.stop()


def test_a_kernel_without_pressure_files(tmp_path: Path) -> None:
    """No PSI: the owner looks by the clock, and its status says why."""
    watch = PressureWatch(tmp_path, LIMITS, lambda: None)
    watch.start()
    assert not watch.watching
    assert watch.refusal == f"{tmp_path}/pressure/cpu: No such file or directory (ENOENT)"
    watch.stop()


def test_a_copy_is_not_written_to(tmp_path: Path) -> None:
    """A tree for tests, or an administrator's, keeps its bytes."""
    (tmp_path / "pressure").mkdir()
    text = "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
    for name in LIMITS:
        (tmp_path / "pressure" / name).write_text(text)
    watch = PressureWatch(tmp_path, LIMITS, lambda: None)
    watch.start()
    assert not watch.watching
    assert "not a pressure file of the kernel" in watch.refusal
    assert (tmp_path / "pressure" / "cpu").read_text() == text


@pytest.mark.parametrize("code", [errno.EPERM, errno.EINVAL, errno.ENOENT, errno.EOPNOTSUPP])
def test_all_triggers_or_none(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """What the kernel refuses for one resource is looked at by the clock for all, and nothing stays open."""
    before = set(os.listdir("/proc/self/fd"))

    def trigger(file: Path, percent: float) -> int:
        if file.name == "io":
            raise OSError(code, os.strerror(code), str(file))
        return os.open(os.devnull, os.O_RDONLY)

    monkeypatch.setattr(pressure, "_trigger", trigger)
    watch = PressureWatch(Path("/nowhere"), LIMITS, lambda: None)
    watch.start()
    assert not watch.watching
    assert watch.refusal == f"/nowhere/pressure/io: {os.strerror(code)} ({errno.errorcode[code]})"
    assert set(os.listdir("/proc/self/fd")) <= before
