"""edge_agent.install: what it refuses beforehand, what it makes of pip's words, what it takes from the lock."""

import os
import platform
import shutil
import sys
from pathlib import Path

import pytest

from edge_agent import install
from edge_agent.install import InstallError
from edge_agent.libraries import WANTED
from shared import lock

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("said", "explained"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "not the one"),
        ("WARNING: Retrying: Failed to establish a new connection: [Errno -2]", "--wheels DIR"),
        ("ERROR: No matching distribution found for torch==2.13.0", "no build for this machine and Python 3."),
        ("ERROR: Could not install: [Errno 13] Permission denied: '/usr/lib'", "run it as root"),
        ("ERROR: something new", "something new"),
        ("", "said nothing"),
    ],
)
def test_pips_words_become_ours(said: str, explained: str) -> None:
    """Whatever pip complains about ends in one line that says what to do."""
    found = install.explained([said, "note: this is no error"] if said else [])
    assert explained in found and "\n" not in found


def test_no_network_comes_before_no_match() -> None:
    """Without a network pip says both; the cause is what counts."""
    lines = ["ERROR: No matching distribution found for torch", "WARNING: Temporary failure in name resolution"]
    assert "cannot be reached" in install.explained(lines)


def test_what_it_installs_is_in_the_lock() -> None:
    """Everything but torch has a version and hashes, and torch has a version."""
    assert install.torch_version() in (ROOT / "requirements" / "torch.txt").read_text()
    chosen = lock.names(lock.subset((ROOT / "requirements" / "lock.txt").read_text(), WANTED))
    assert set(WANTED) - {"torch"} <= chosen and "jinja2" in chosen and "rich" not in chosen


def test_what_cannot_work_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong machine, wrong folder, no right to write, no room: one line each, and pip is not even started."""
    words: list[str] = []
    with pytest.raises(InstallError, match="no wheel of torch in"):
        install.install(words.append, wheels=tmp_path)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(InstallError, match="no builds of PyTorch for riscv64"):
        install.install(words.append)
    monkeypatch.undo()
    monkeypatch.setattr(install, "_version", lambda name: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 5 << 20))
    with pytest.raises(InstallError, match="5 MiB are free"):
        install.install(words.append)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InstallError, match="run it as root"):
        install.install(words.append)
    with pytest.raises(InstallError, match="run it as root"):
        install.remove(words.append)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    with pytest.raises(InstallError, match="no virtual environment"):
        install.install(words.append)
    assert words == []


def test_what_is_installed_here() -> None:
    """The tests' own environment is complete, and says which torch it has."""
    found = install.installed()
    assert found.missing == () and found.version is not None and found.version.startswith(found.wanted)


def test_a_trial_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that cannot be imported or dies of an instruction is no success."""
    monkeypatch.setattr(install, "_CHECK", "raise ImportError('libgomp.so.1: no such file')")
    with pytest.raises(InstallError, match="libgomp"):
        install._try()
    monkeypatch.setattr(install, "_CHECK", "import os; os.kill(os.getpid(), 4)")
    with pytest.raises(InstallError, match="signal 4"):
        install._try()
