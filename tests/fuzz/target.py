"""A parser under attack: how its bad input is made, and what must be true of everything that it takes or refuses."""

from collections.abc import Callable
from dataclasses import dataclass
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
