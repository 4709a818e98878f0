"""Runs a daemon under another wall clock: `python -m tests.hostile.clock FILE PACKAGE ARGUMENT...`.

FILE holds the seconds by which the clock is off, and is read at every look, so that a test sets it while the daemon
runs. The kernel is taken to say that nothing has set this clock. TLS goes by the real one.
"""

import runpy
import sys
import time
from pathlib import Path


class Wall:
    """The file that says how far a daemon's clock is off."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "clock"
        self.set(0)

    def set(self, seconds: float) -> None:
        """From now on; the file is never half written."""
        new = self.path.with_suffix(".new")
        new.write_text(str(seconds))
        new.replace(self.path)


def main() -> None:
    """Become the daemon."""
    file, package, *arguments = sys.argv[1:]
    path, real = Path(file), time.time
    time.time = lambda: real() + float(path.read_text())
    if package == "edge_agent":
        from edge_agent import clock

        clock.synchronised = lambda: False
    sys.argv = [package, *arguments]
    runpy.run_module(f"{package}.cli", run_name="__main__")


if __name__ == "__main__":
    main()
