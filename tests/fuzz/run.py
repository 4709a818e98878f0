"""The long fuzz: a million inputs and more for every parser, on all CPUs; one printed seed a batch.

    python -m tests.fuzz.run                                    # everything, a new seed
    python -m tests.fuzz.run --only wire --seed 7 --inputs 10000    # the batch that was printed with seed 7, again

Each parser is attacked in a process of its own, so that one that takes the interpreter down is seen. It ends with 1 if
an input broke a promise, took too long or made the process grow; the input is then in build/fuzz.
"""

import argparse
import faulthandler
import json
import os
import random
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS

BATCH = 10_000
PATIENCE = 600
"""Seconds for a batch, after which it is taken to hang; its stack is printed."""
GROWTH = 192 << 20
"""Bytes by which the process may grow after its first batch, at its highest: one input's worth, and no leak."""
FOUND = Path("build/fuzz")


def attack(target: Target, seed: int, inputs: int) -> None:
    """Batches until so many inputs were judged; AssertionError names the batch and what went wrong."""
    floor = 0
    for number in range(-(-inputs // BATCH)):
        count = min(BATCH, inputs - number * BATCH)
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        began, taken, slowest = time.monotonic(), 0, 0.0
        rng = random.Random(f"{target.name} {seed + number}")
        for _ in range(count):
            made = target.make(rng)
            start = time.thread_time()
            try:
                taken += target.judge(made)
            except KeyboardInterrupt:
                raise
            except BaseException:  # noqa: BLE001  a panic in a library is none of Exception's
                raise AssertionError(f"{_kept(target, seed + number, made)}\n{traceback.format_exc()}") from None
            spent = time.thread_time() - start
            slowest = max(slowest, spent)
            if spent > target.seconds:
                raise AssertionError(f"{_kept(target, seed + number, made)}\none input took {spent:.1f} s of CPU")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        floor = floor or peak
        print(
            f"{target.name:<13} seed {seed + number:<11} {count / (time.monotonic() - began):>7.0f}/s"
            f"  taken {taken / count:>5.1%}  slowest {1000 * slowest:>6.1f} ms  peak {peak >> 20} MB",
            flush=True,
        )
        if peak - floor > GROWTH:
            raise AssertionError(f"{target.name}, seed {seed + number}: grew by {(peak - floor) >> 20} MB")
    faulthandler.cancel_dump_traceback_later()


def _kept(target: Target, seed: int, made: object) -> str:
    FOUND.mkdir(parents=True, exist_ok=True)
    path = FOUND / f"{target.name}-{seed}.txt"
    path.write_text(f"{made!r}\n")
    return f"{target.name}, seed {seed}: {path}: {made!r:.300}"


def run(names: Sequence[str], seed: int, inputs: int | None, jobs: int) -> dict[str, int]:
    """Attack these targets, `jobs` at a time; the exit status of each."""
    waiting, running, ended = list(names), dict[str, subprocess.Popen[bytes]](), dict[str, int]()
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            count = TARGETS[name].soak if inputs is None else inputs
            command = [
                sys.executable,
                "-m",
                "tests.fuzz.run",
                "--one",
                name,
                "--seed",
                str(seed),
                "--inputs",
                str(count),
            ]
            running[name] = subprocess.Popen(command, env=environ)
        for name, child in list(running.items()):
            if child.poll() is not None:
                ended[name] = running.pop(name).returncode
        time.sleep(0.1)
    return ended


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=TARGETS, help="this parser; may be repeated")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first batch")
    parser.add_argument("--inputs", type=int, help="for each parser, instead of its own number")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--one", choices=TARGETS, help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    if found.one:
        try:
            attack(TARGETS[found.one], found.seed, found.inputs)
        except AssertionError as error:
            print(f"BROKEN: {error}", file=sys.stderr, flush=True)
            return 1
        return 0
    began = time.monotonic()
    ended = run(found.only or list(TARGETS), found.seed, found.inputs, found.jobs)
    bad = sorted(name for name, status in ended.items() if status)
    print(
        json.dumps(
            {"seed": found.seed, "seconds": round(time.monotonic() - began), "targets": len(ended), "broken": bad}
        )
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
