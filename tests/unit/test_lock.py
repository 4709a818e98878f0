"""shared.lock: what a few packages need of the whole lock."""

import re
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest

from shared import lock

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements" / "lock.txt").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SMALL = """\
# a comment
alone==1 \\
    --hash=sha256:aa
    # via fieldfare (pyproject.toml)
deep==2.0 \\
    --hash=sha256:bb \\
    --hash=sha256:cc
    # via middle
middle==3 \\
    --hash=sha256:dd
    # via
    #   fieldfare (pyproject.toml)
    #   torch
"""


def test_what_is_needed_of_what_is_needed_comes_too() -> None:
    """A package brings those that it needs, theirs too, and no other; every hash stays."""
    assert lock.subset(SMALL, ["Middle"]) == (
        "deep==2.0 \\\n    --hash=sha256:bb \\\n    --hash=sha256:cc\nmiddle==3 \\\n    --hash=sha256:dd\n"
    )
    assert lock.names(lock.subset(SMALL, ["deep"])) == {"deep"}


def test_one_that_is_kept_apart_has_its_needs_in_the_lock() -> None:
    """torch is not in the lock; what it needs is found by its name."""
    assert lock.names(lock.subset(SMALL, ["torch"])) == {"middle", "deep"}


def test_a_stranger_is_refused() -> None:
    """A name that the lock does not know is a mistake, not nothing."""
    with pytest.raises(ValueError, match="strange"):
        lock.subset(SMALL, ["alone", "strange"])


@pytest.mark.parametrize("extra", [None, "aggregator", "train", "registrar"])
def test_a_part_of_the_real_lock_is_whole(extra: str | None) -> None:
    """By what the installed packages say of themselves, nothing that they need is left out, and nothing is changed."""
    listed = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    wanted = [re.split(r"[^A-Za-z0-9_.-]", one, maxsplit=1)[0] for one in listed]
    part = lock.subset(LOCK, wanted)
    assert set(part.splitlines()) <= set(LOCK.splitlines())
    chosen = lock.names(part)
    for name in chosen | ({"torch"} & set(wanted)):
        for need in requires(name) or []:
            other, marker = re.match(r"([A-Za-z0-9._-]+)[^;]*;?(.*)", need).groups()  # type: ignore[union-attr]
            if marker.strip() or lock.canonical(other) not in lock.names(LOCK):
                continue
            assert lock.canonical(other) in chosen, (name, need)
