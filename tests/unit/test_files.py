"""shared.files: a file is there whole or not at all."""

import os
import resource
import stat
from pathlib import Path

import pytest

from shared.files import hold, write_durably


def test_written_and_replaced(tmp_path: Path) -> None:
    """The new bytes take the place of the old, and nothing else is left in the folder."""
    path = tmp_path / "state"
    write_durably(path, b"old and longer")
    write_durably(path, memoryview(bytearray(b"new")))
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["state"]


def test_for_its_owner_only(tmp_path: Path) -> None:
    """What is kept may be a key: nobody else reads it, whatever the umask."""
    before = os.umask(0)
    try:
        write_durably(tmp_path / "key", b"secret")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_what_a_crash_left_is_no_obstacle(tmp_path: Path) -> None:
    """A half-written file of an earlier crash is written over, and never read as the file itself."""
    (tmp_path / ".state.new").write_bytes(b"half of something much longer than what follows")
    assert not (tmp_path / "state").exists()
    write_durably(tmp_path / "state", b"whole")
    assert (tmp_path / "state").read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["state"]


def test_a_failed_write_keeps_the_old(tmp_path: Path) -> None:
    """Where the file cannot be put in its place, what was there before stays."""
    path = tmp_path / "state"
    path.mkdir()
    (path / "inside").write_bytes(b"kept")
    with pytest.raises(OSError):
        write_durably(path, b"new")
    assert (path / "inside").read_bytes() == b"kept"


def test_a_full_disk_keeps_the_old(tmp_path: Path) -> None:
    """A write that stops half-way never touches the file that is there."""
    path = tmp_path / "state"
    write_durably(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError):
            write_durably(path, b"new and far too long")
        assert os.listdir(tmp_path) == ["state"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"


def test_no_folder(tmp_path: Path) -> None:
    """A missing folder is the caller's mistake and is not made up for."""
    with pytest.raises(FileNotFoundError):
        write_durably(tmp_path / "absent" / "state", b"x")
    assert not (tmp_path / "absent").exists()


def test_one_holds_a_file(tmp_path: Path) -> None:
    """Until it lets go or ends in any way; what is in the file stays."""
    (tmp_path / "lock").write_text("mine")
    first = hold(tmp_path / "lock")
    assert first is not None and hold(tmp_path / "lock") is None
    first.close()
    child = os.fork()
    if child == 0:
        os._exit(0 if hold(tmp_path / "lock") else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    again = hold(tmp_path / "lock")
    assert again is not None
    again.close()
    assert (tmp_path / "lock").read_text() == "mine"
