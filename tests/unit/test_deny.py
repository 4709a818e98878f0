"""aggregator.deny: a name on the list is denied at once, and is put there whole."""

import os
from pathlib import Path

import pytest

from aggregator import deny
from aggregator.deny import DenyList
from shared.errors import ConfigError


def test_an_absent_file_denies_nobody(tmp_path: Path) -> None:
    """Nor does no file at all."""
    assert not DenyList(tmp_path / "deny.txt").has("a")
    assert not DenyList(None).has("a")


def test_a_name_is_denied_at_once(tmp_path: Path) -> None:
    """Readers see it in their next look, though the file has the same size and time as before."""
    path = tmp_path / "deny.txt"
    path.write_text("aa")
    found = DenyList(path)
    assert found.has("aa")
    stat = path.stat()
    fresh = tmp_path / "new"
    fresh.write_text("bb")
    os.utime(fresh, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    fresh.replace(path)
    assert found.names() == {"bb"}


def test_names_are_added_once_and_nothing_is_lost(tmp_path: Path) -> None:
    """What was there stays, also without a line feed at its end; a second time changes nothing."""
    path = tmp_path / "deny.txt"
    assert deny.add(path, "first")
    path.write_text("first\nsecond")
    assert deny.add(path, "third")
    assert not deny.add(path, "second")
    assert path.read_text() == "first\nsecond\nthird\n"
    assert list(tmp_path.iterdir()) == [path]


def test_its_readers_stay_its_readers(tmp_path: Path) -> None:
    """A new list is for every daemon to read; one with a mode of its own keeps it."""
    path = tmp_path / "deny.txt"
    deny.add(path, "a")
    assert path.stat().st_mode & 0o777 == 0o644
    path.chmod(0o640)
    deny.add(path, "b")
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_list_that_cannot_be_read_ends_the_daemon(tmp_path: Path) -> None:
    """Nobody may count whom it might deny."""
    path = tmp_path / "deny.txt"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        DenyList(path).has("a")
