"""The device's time: right when it is known to be right, and never before what is known to be over."""

from pathlib import Path

import pytest

from edge_agent import clock
from edge_agent.clock import KEEP_EVERY, DeviceClock
from shared.machine import Instant

ISSUED = 1_700_000_000.0
TODAY = 1_800_000_000.0


def made(file: Path, utc: float, mono: float = 100.0, synchronised: bool = False) -> DeviceClock:
    """A clock whose certificate began at ISSUED."""
    return DeviceClock(file, ISSUED, Instant(mono, utc), lambda: synchronised)


def test_a_board_that_wakes_up_in_1970(tmp_path: Path) -> None:
    """Its time begins where the certificate does, and passes."""
    found = made(tmp_path / "clock", 0.0)
    assert found.at(Instant(100.0, 0.0)) == Instant(100.0, ISSUED)
    assert found.at(Instant(700.0, 600.0)) == Instant(700.0, ISSUED + 600)


def test_a_clock_that_goes_right(tmp_path: Path) -> None:
    """Without synchronisation the later one counts."""
    assert made(tmp_path / "clock", TODAY).at(Instant(100.0, TODAY)).utc == TODAY


def test_a_synchronised_clock_is_believed(tmp_path: Path) -> None:
    """Also when it says less than was on record: that was wrong then."""
    found = made(tmp_path / "clock", TODAY, synchronised=True)
    assert found.at(Instant(100.0, TODAY)).utc == TODAY
    assert found.at(Instant(200.0, 0.0)).utc == 0.0


def test_the_floor_outlives_a_reboot(tmp_path: Path) -> None:
    """What was synchronised once is over for ever, and so is what passed after it."""
    state = [True]
    found = DeviceClock(tmp_path / "clock", ISSUED, Instant(0.0, TODAY), lambda: state[0])
    found.at(Instant(10.0, TODAY + 10))
    state[0] = False
    found.keep(Instant(20.0, 0.0))
    assert made(tmp_path / "clock", 0.0).at(Instant(100.0, 0.0)).utc == TODAY + 20


def test_a_clock_that_ran_ahead_unsynchronised_leaves_nothing(tmp_path: Path) -> None:
    """Set back, it is right again, also after a reboot."""
    found = made(tmp_path / "clock", TODAY)
    assert found.at(Instant(110.0, TODAY + 10**9)).utc == TODAY + 10**9
    found.keep(Instant(120.0, TODAY + 10**9))
    assert found.at(Instant(130.0, TODAY)).utc == TODAY
    assert made(tmp_path / "clock", TODAY).at(Instant(100.0, TODAY)).utc == TODAY


def test_a_clock_that_is_set_back_years(tmp_path: Path) -> None:
    """Once synchronised, it cannot fall behind what it said then."""
    state = [True]
    found = DeviceClock(tmp_path / "clock", ISSUED, Instant(0.0, TODAY), lambda: state[0])
    found.at(Instant(0.0, TODAY))
    state[0] = False
    assert found.at(Instant(60.0, TODAY - 10**8)).utc == TODAY + 60


def test_the_file_is_written_now_and_then(tmp_path: Path) -> None:
    """At the start, and not more often than once an hour."""
    file = tmp_path / "clock"
    found = made(file, TODAY)
    found.keep(Instant(100.0, TODAY))
    file.unlink()
    found.keep(Instant(99.0 + KEEP_EVERY, TODAY))
    assert not file.exists()
    found.keep(Instant(100.0 + KEEP_EVERY, TODAY))
    assert file.exists()


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"1900000000 1900000001\n", b"-5 -5\n", b"9" * 20 + b" " + b"9" * 20]
)
def test_a_damaged_file_is_none(tmp_path: Path, content: bytes) -> None:
    """A digit that flipped must not move a device years ahead."""
    (tmp_path / "clock").write_bytes(content)
    assert made(tmp_path / "clock", 0.0).at(Instant(100.0, 0.0)).utc == ISSUED


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    """Time goes on without its file."""
    found = made(tmp_path / "gone" / "clock", 0.0)
    found.keep(Instant(100.0, 0.0))
    assert found.at(Instant(100.0, 0.0)).utc == ISSUED


def test_the_system_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd-timesyncd's word is enough; without it the kernel's counts, which is a plain answer in any case."""
    monkeypatch.setattr(clock, "TIMESYNCD", tmp_path / "synchronized")
    assert clock.synchronised() in (True, False)
    (tmp_path / "synchronized").touch()
    assert clock.synchronised()
