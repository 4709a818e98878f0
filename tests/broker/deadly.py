"""`aggregator run` that a certain update kills while it is handled: a fault that a test puts in, not the product."""

import os
import signal
import sys
from collections.abc import Sequence

from aggregator import cli, validate
from aggregator.fold import Vector
from shared.codec import Codec

MARK = 0.4375
"""The first value of a delta that kills."""

_delta = validate.delta


def _deadly(name: Codec, data: memoryview, sizes: Sequence[int], clip: float) -> Vector:
    found = _delta(name, data, sizes, clip)
    if found[0] == MARK:
        os.kill(os.getpid(), signal.SIGKILL)
    return found


if __name__ == "__main__":
    validate.delta = _deadly
    sys.exit(cli.main())
