"""edge_agent.libraries: whether a trainer could start, told from folders."""

from pathlib import Path

import pytest

from edge_agent.libraries import WANTED, lacks_one, present


def venv(folder: Path, *names: str) -> Path:
    """What a virtual environment with these packages looks like; its interpreter leads out of it, as a real one's."""
    site = folder / "lib" / "python3.11" / "site-packages"
    site.mkdir(parents=True)
    for name in names:
        (site / name).mkdir()
    (folder / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to("/usr/bin/python3")
    return folder / "bin" / "python"


def test_ours_has_them() -> None:
    """The interpreter of the tests has a trainer's libraries."""
    assert present() is True


@pytest.mark.parametrize("absent", WANTED)
def test_one_absent_is_enough(tmp_path: Path, absent: str) -> None:
    """A virtual environment that lacks any of them cannot train, until it is there: no answer is kept."""
    python = venv(tmp_path, *(set(WANTED) - {absent}))
    assert present(python) is False
    (tmp_path / "lib" / "python3.11" / "site-packages" / absent).mkdir()
    assert present(python) is True


def test_what_others_lend_cannot_be_seen(tmp_path: Path) -> None:
    """Where packages may come from elsewhere, only a start of the interpreter can tell."""
    python = venv(tmp_path)
    (tmp_path / "lib" / "python3.11" / "site-packages" / "lent.pth").write_text("/elsewhere\n")
    assert present(python) is None
    (tmp_path / "script").write_text("#!/bin/sh\n")
    assert present(tmp_path / "script") is None
    assert present(Path("/nowhere/at/all/bin/python")) is None


@pytest.mark.parametrize(
    ("line", "lacking"),
    [
        ("ModuleNotFoundError: No module named 'torch'", True),
        ("ModuleNotFoundError: No module named 'zstandard'", True),
        ("ModuleNotFoundError: No module named 'torchvision'", False),
        ("  import torch", False),
    ],
)
def test_a_trainers_last_words(line: str, lacking: bool) -> None:
    """A trainer that ended for want of a library is told from one that ended for another reason."""
    assert lacks_one(line) is lacking
