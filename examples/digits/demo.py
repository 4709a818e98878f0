"""`make demo`: a fleet of devices, each of which has seen three of the ten digits, learns together to read all ten.

Everything is real: the fleet's keys and certificates, mosquitto with TLS 1.3, the aggregator, the agents and their
trainers, each a process of its own. The course of it is course.py; this is the command around it. It exits with 1 when
the last release reads less than .70 of the hold-outs of all devices right, and leaves no process behind.
"""

import os
import re
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from examples.digits.processes import ENDING
from shared.cli import Exit, Parser, complain
from shared.errors import FieldfareError

INTERRUPTED = "interrupted; all of its processes have ended"


def main() -> int:
    """Run the demo; returns the exit code."""
    options = _options()
    _at_the_end(_leave)
    # Seconds of torch and scikit-learn; an exception raised in the depths of their imports could be lost there.
    from examples.digits import course
    from examples.digits.report import ENOUGH, dot

    try:
        _at_the_end(_interrupt)
        report = course.run(options.folder, options.devices, options.rounds)
        print("\n".join(["", *report.lines()]), flush=True)
    except KeyboardInterrupt:
        return complain("demo", INTERRUPTED, Exit.INTERRUPTED)
    except FieldfareError as error:
        print(f"demo: {error}", file=sys.stderr)  # may end with lines of a log
        return Exit.FAILED
    except OSError as error:
        return complain("demo", f"{error.filename}: {error.strerror}" if error.filename else error, Exit.FAILED)
    if not report.passed:
        text = f"an accuracy of {dot(report.accuracy)} after round {report.rounds[-1].round} is below {dot(ENOUGH)}"
        return complain("demo", text, Exit.FAILED)
    return Exit.OK


def _at_the_end(action: Callable[[int, FrameType | None], NoReturn]) -> None:
    for number in ENDING:
        signal.signal(number, action)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(complain("demo", INTERRUPTED, Exit.INTERRUPTED))  # no process and no folder is there yet


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _options() -> Namespace:
    parser = Parser(
        prog="demo",
        description="Eight devices, each of which has seen three of the ten digits, learn together to read them all.",
        examples=("make demo", "make demo DEVICES=4 ROUNDS=30", "make demo ARGS='--folder build/demo2'"),
    )
    parser.add_argument("--devices", default="8", metavar="DEVICES", help="how many (default: %(default)s)")
    parser.add_argument("--rounds", default="15", metavar="ROUNDS", help="how many (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/demo"), help="emptied and made anew (default: %(default)s)"
    )
    options = parser.parse_args()
    for name, most in {"devices": 60, "rounds": 1000}.items():
        text = vars(options)[name]
        if not re.fullmatch("[0-9]{1,4}", text) or not 1 <= int(text) <= most:
            parser.error(f"{name.upper()} must be a whole number from 1 to {most}; it is {text or 'empty'}")
        setattr(options, name, int(text))
    return options


if __name__ == "__main__":
    sys.exit(main())
