"""A parser under attack: how its bad input is made, and what must be true of everything that it takes or refuses."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any


@dataclass(frozen=True)
class Target:
    """`judge` says whether an input was taken; whatever it raises is a bug, because what is refused must be typed."""

    name: str
    make: Callable[[Random], Any]
    """An input, which may even be a good one."""
    judge: Callable[[Any], bool]
    good: Callable[[], list[Any]]
    """Inputs that are taken: without them a parser that refuses everything would pass."""
    seconds: float = 1.0
    """CPU that one input may take at most."""
    examples: int = 100
    """How many hypothesis tries in `make test`."""
    soak: int = 1_000_000
    """How many inputs `make soak` tries; fewer where one input is a whole session or a computation."""


@cache
def _folder(name: str) -> "tempfile.TemporaryDirectory[str]":
    shared = Path("/dev/shm")
    where = shared if os.access(shared, os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix=f"fieldfare-fuzz-{name}-", dir=where)


def folder(name: str) -> Path:
    """A folder for as long as this process lives; it lies in memory where there is such a place."""
    return Path(_folder(name).name)
