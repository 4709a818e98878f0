"""The simulation's command line: schedules by their seeds, on as many cores as there are.

    python -m tests.sim.run --seeds 0..999 --jobs 4     run these schedules; the first that fails ends it with its seed
    python -m tests.sim.run --seeds 17 --trace          replay one and show what happens

Same seed, same schedule, whatever the process; PYTHONHASHSEED is set all the same. The promises: tests.sim.judge.
"""

import argparse
import atexit
import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

from tests.sim.schedule import Fleet, checked

PORTION = 10
"""Schedules that a process takes at a time, where there are many."""


@contextlib.contextmanager
def place() -> Iterator[Path]:
    """A folder for a fleet, in memory where that is possible: every write here is synchronised to the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder)


def many(seeds: Iterator[int], seconds: float | None, jobs: int) -> Counter[str]:
    """Schedules on several cores, all of `seeds` or for so many seconds; the first failure is raised."""
    end = None if seconds is None else time.monotonic() + seconds
    seen: Counter[str] = Counter()
    with ProcessPoolExecutor(jobs, initializer=_begin) as pool:
        waiting: set[Future[Counter[str]]] = set()
        while True:
            while len(waiting) < 2 * jobs and (end is None or time.monotonic() < end):
                portion = list(itertools.islice(seeds, PORTION))
                if not portion:
                    break
                waiting.add(pool.submit(_portion, portion))
            if not waiting:
                return seen
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            try:
                seen = sum((each.result() for each in done), seen)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


_site: Fleet | None = None
"""Of this process, where it is one of many."""


def _begin() -> None:
    global _site
    folder = contextlib.ExitStack()
    _site = Fleet.make(folder.enter_context(place()))
    atexit.register(folder.close)


def _portion(seeds: list[int]) -> Counter[str]:
    assert _site is not None
    return sum((checked(seed, _site) for seed in seeds), Counter())


def show(text: str) -> None:
    """A line on standard output."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    """See the module."""
    options = argparse.ArgumentParser(prog="python -m tests.sim.run", description=(__doc__ or "").splitlines()[0])
    options.add_argument("--seeds", default="0..99", help="N or FIRST..LAST (default 0..99)")
    options.add_argument("--trace", action="store_true", help="show what happens")
    options.add_argument("--seconds", type=float, help="go on after FIRST for so long, seed after seed")
    options.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    given = options.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":
        return subprocess.call(
            [sys.executable, "-m", "tests.sim.run", *sys.argv[1:]], env=os.environ | {"PYTHONHASHSEED": "0"}
        )
    first, _, last = given.seeds.partition("..")
    end = int(first) + 10**9 if given.seconds is not None else int(last or first) + 1
    seeds = iter(range(int(first), end))
    if given.trace:
        with place() as folder:
            fleet = Fleet.make(folder)
            seen = sum((checked(seed, fleet, show) for seed in seeds), Counter[str]())
    else:
        seen = many(seeds, given.seconds, given.jobs)
    show(", ".join(f"{name} {number}" for name, number in sorted(seen.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
