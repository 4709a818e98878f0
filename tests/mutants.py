"""`make mutants`: breaks the named guards one by one, in a copy of this tree, and expects the tests to go red.

A mutant is one small edit of one file that takes a guard away (tests/mutants/*.toml). Each is applied alone and the
tests named for it are run: a failing test kills it. One that survives, does not apply or breaks more than its guard (a
test module that cannot be imported, a fixture that fails) is an error. First all these tests must pass unmutated, on
the copy's own modules. The working tree is never written to.
"""

import argparse
import fnmatch
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
LISTS = ROOT / "tests" / "mutants"
PACKAGES = ("shared", "edge_agent", "aggregator", "tests")
PATIENCE = 120.0
"""Seconds that the tests of one mutant may take."""

Verdict = Literal["killed", "survived", "broken"]


@dataclass(frozen=True, slots=True)
class Mutant:
    """`old` in `file` becomes `new`, which takes `guard` away; at least one of `tests` (pytest ids) must fail."""

    guard: str
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def id(self) -> str:
        """How it is named on the command line."""
        return f"{self.guard}.{self.name}"

    def apply(self, source: str) -> str:
        """The mutated text; ValueError unless `old` is there exactly once."""
        count = source.count(self.old)
        if count != 1:
            raise ValueError(f"{self.id}: its text is {count} times in {self.file}, not once")
        return source.replace(self.old, self.new)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a mutant; `words` are for people: which test killed it, or what went wrong."""

    mutant: Mutant
    verdict: Verdict
    seconds: float
    words: str


def load(folder: Path = LISTS) -> list[Mutant]:
    """Every mutant, in the order of the files and of their entries: `[guard.name]` with file, old, new and tests."""
    found = []
    for path in sorted(folder.glob("*.toml")):
        for guard, entries in tomllib.loads(path.read_text()).items():
            for name, entry in entries.items():
                tests = tuple(entry.pop("tests"))
                found.append(Mutant(guard, name, tests=tests, **entry))
    return found


class Copy:
    """A copy of the tree in which mutants are tried, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Whatever a mutant's process compiled is recognised by its source's hash, so nothing stale is ever run.
        self._run(["-m", "compileall", "-q", "--invalidation-mode", "checked-hash", *PACKAGES])

    @classmethod
    def of(cls, root: Path, folder: Path) -> "Copy":
        """What git tracks or would, as it stands in the working tree now."""
        command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(command, check=True, capture_output=True).stdout.decode().split("\0"):
            source, target = root / name, folder / name
            if name and (source.is_symlink() or source.is_file()):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)
        return cls(folder)

    def check_imports(self) -> None:
        """SystemExit unless a process of this copy imports this copy's modules, and not those that are installed."""
        names = ", ".join(PACKAGES[:3])
        code = f"import {names}; print(*(module.__file__ for module in ({names})), sep='\\n')"
        found = self._run(["-c", code], cwd=self._folder.parent).splitlines()
        if found != [str(self._folder / name / "__init__.py") for name in PACKAGES[:3]]:
            raise SystemExit(f"these modules would be tested instead of the mutated ones: {', '.join(found)}")

    def pytest(self, tests: Sequence[str], *options: str, patience: float = PATIENCE) -> tuple[int | None, str]:
        """(exit status, None if it took too long; output) of some tests."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=short", *options, *tests]
        with subprocess.Popen(
            command,
            cwd=self._folder,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=patience)
                return process.returncode, output.decode(errors="replace")
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return None, process.communicate()[0].decode(errors="replace")

    def judge(self, mutant: Mutant) -> Result:
        """Try one mutant; the copy is as before afterwards."""
        start = time.monotonic()
        path = self._folder / mutant.file
        source = path.read_text()
        try:
            path.write_text(mutant.apply(source))
            status, output = self.pytest(mutant.tests)
        except ValueError as error:
            return Result(mutant, "broken", 0.0, str(error))
        finally:
            path.write_text(source)
        verdict, words = _verdict(status, output)
        return Result(mutant, verdict, time.monotonic() - start, words)

    def _environment(self) -> dict[str, str]:
        # CI: property tests draw the same examples every time.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        return kept | {"PYTHONPATH": str(self._folder), "CI": "1"}

    def _run(self, arguments: Sequence[str], cwd: Path | None = None) -> str:
        command = [sys.executable, *arguments]
        where = cwd or self._folder
        done = subprocess.run(command, cwd=where, env=self._environment(), check=True, stdout=subprocess.PIPE)
        return done.stdout.decode()


def _verdict(status: int | None, output: str) -> tuple[Verdict, str]:
    if status is None:
        return "broken", f"no end within {PATIENCE:g} s"
    if status == 0:
        return "survived", "every test still passes"
    failed = re.search(r"^FAILED (\S+)", output, re.MULTILINE)
    if status == 1 and failed is not None:
        return "killed", failed[1]
    return "broken", f"pytest ended with {status}, without a failed test:\n{output[-2000:]}"


def chosen(mutants: Sequence[Mutant], patterns: Sequence[str]) -> list[Mutant]:
    """Those whose id or guard fits one of the patterns; all without patterns. SystemExit if one fits nothing."""
    for pattern in patterns:
        if not any(_fits(mutant, pattern) for mutant in mutants):
            raise SystemExit(f"no mutant fits {pattern!r}; --list shows them")
    return [mutant for mutant in mutants if not patterns or any(_fits(mutant, pattern) for pattern in patterns)]


def _fits(mutant: Mutant, pattern: str) -> bool:
    return fnmatch.fnmatchcase(mutant.id, pattern) or mutant.guard == pattern


def baseline(copy: Copy, mutants: Sequence[Mutant], jobs: int) -> None:
    """SystemExit unless every test that the mutants name passes as things are; a skipped one proves nothing."""
    tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    status, output = copy.pytest(tests, "-n", str(jobs), "--dist", "loadfile", patience=10 * PATIENCE)
    if status != 0 or re.search(r"^SKIPPED ", output, re.MULTILINE):
        raise SystemExit(f"{output}\nthese tests must pass, all of them, before a mutant can mean anything")


def report(results: Sequence[Result]) -> str:
    """A table of the guards, then what went wrong."""
    lines = [f"{'guard':<16} mutants  killed  survived  broken"]
    for guard in dict.fromkeys(result.mutant.guard for result in results):
        verdicts = [result.verdict for result in results if result.mutant.guard == guard]
        counts = [verdicts.count(verdict) for verdict in ("killed", "survived", "broken")]
        lines.append(f"{guard:<16} {len(verdicts):7}  {counts[0]:6}  {counts[1]:8}  {counts[2]:6}")
    for result in results:
        if result.verdict != "killed":
            mutant = result.mutant
            lines.append(f"\n{result.verdict.upper()} {mutant.id} in {mutant.file}: {result.words}")
            lines += [f"  - {line}" for line in mutant.old.splitlines()]
            lines += [f"  + {line}" for line in mutant.new.splitlines()]
    return "\n".join(lines)


def main() -> int:
    """0: every mutant was killed; 1: not every one; 2: wrong use, as argparse says."""
    options = argparse.ArgumentParser(description="Break the named guards one by one; the tests must go red.")
    options.add_argument("--only", action="append", default=[], metavar="NAME", help="guard, guard.name or a pattern")
    options.add_argument("--list", action="store_true", help="name the mutants and end")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options.add_argument("--jobs", type=int, default=2, help="mutants at a time (2)")
    given = options.parse_args()
    mutants = chosen(load(), given.only)
    if given.list:
        for mutant in mutants:
            print(f"{mutant.id:<45} {mutant.file}")
        return 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fieldfare-mutants-") as scratch:
        copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for number in range(given.jobs):
            copy = Copy.of(ROOT, Path(scratch) / f"copy-{number}")
            copy.check_imports()
            copies.put(copy)
        print(f"the tests of {len(mutants)} mutants, unmutated ...", flush=True)
        baseline(copy, mutants, given.jobs)
        print(f"green after {time.monotonic() - start:.0f} s", flush=True)
        results: list[Result] = []

        def judge(mutant: Mutant) -> Result:
            place = copies.get()
            try:
                return place.judge(mutant)
            finally:
                copies.put(place)

        with ThreadPoolExecutor(given.jobs) as pool:
            for done in as_completed([pool.submit(judge, mutant) for mutant in mutants]):
                results.append(result := done.result())
                count, words = f"{len(results)}/{len(mutants)}", result.words.splitlines()[0]
                print(
                    f"{count:>8}  {result.verdict:<8} {result.mutant.id:<42} {result.seconds:5.1f} s  {words}",
                    flush=True,
                )
    results.sort(key=lambda result: mutants.index(result.mutant))
    seconds = time.monotonic() - start
    killed = sum(result.verdict == "killed" for result in results)
    print(f"\n{report(results)}\n\n{killed} of {len(results)} killed in {seconds:.0f} s")
    if given.json is not None:
        rows = [
            {
                "guard": result.mutant.guard,
                "name": result.mutant.name,
                "file": result.mutant.file,
                "verdict": result.verdict,
                "seconds": round(result.seconds, 2),
                "words": result.words,
            }
            for result in results
        ]
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps({"seconds": round(seconds, 1), "mutants": rows}, indent=1) + "\n")
    return 0 if killed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
