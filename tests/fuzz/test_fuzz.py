"""No input breaks a parser: what it takes keeps the promises, what it refuses is refused typed, fast and cheaply."""

import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from shared import wire
from shared.errors import RemoteProtocolError
from shared.messages import TaskManifest
from tests.fuzz.mutate import bomb
from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS


def timed(target: Target, made: Any) -> float:
    """CPU seconds for which a parser is busy with an input."""
    began = time.thread_time()
    target.judge(made)
    return time.thread_time() - began


@pytest.mark.parametrize("name", TARGETS)
def test_good_input_is_taken(name: str) -> None:
    """The attacks begin with what is right, so that a refusal is for what was changed."""
    target = TARGETS[name]
    found = target.good()
    assert found and all(target.judge(each) for each in found)


@pytest.mark.parametrize("name", TARGETS)
def test_bad_input_is_refused(name: str) -> None:
    """Whatever is changed in good input, the parser keeps its promises within its time."""
    target = TARGETS[name]
    slowest = 0.0

    @settings(
        max_examples=target.examples,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    )
    @given(st.randoms(use_true_random=False))
    def attack(rng: object) -> None:
        nonlocal slowest
        made = target.make(rng)
        spent = timed(target, made)
        if spent >= target.seconds:  # or was it what else this machine does?
            spent = min(spent, timed(target, made), timed(target, made))
        slowest = max(slowest, spent)

    attack()
    assert slowest < target.seconds, f"{slowest:.3f} s of CPU for one input"


@pytest.mark.parametrize("item", [b"\x80", b"\x90", b"\xc0", b"\x91\x80", b"\x81\xa0\x80"])
def test_small_things_in_great_number_cost_little_memory(item: bytes) -> None:
    """What is refused never took more than a hundred times its own size, even where it is made for that."""
    data = b"\x81\xa1v" + bomb(item, 20_000)
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            wire.unpack(data, TaskManifest)
        assert tracemalloc.get_traced_memory()[1] < 100 * len(data)
    finally:
        tracemalloc.stop()
