"""A trainer without torch: whatever the release, its delta is 1 in one cell and 0 elsewhere.

The cell is the number in the job's data file. It speaks edge_agent.jobs over its pipes and seals as the product's
trainer does; it lives as long as its stdin. No numpy, which would double the cost of a start.
"""

import hashlib
import os
import struct
import sys
import time
from pathlib import Path

from edge_agent import jobs
from edge_agent.jobs import Done, Job, Said
from shared import sealing
from shared.files import write_durably
from shared.layout import dimension
from shared.messages import PlainBody

EXAMPLES, HOLDOUT, METRICS = 10, 4, {"loss": 1.0, "accuracy": 0.5}
_ONE = struct.pack("<f", 1.0)


def do(job: Job) -> Done:
    """One job, done; its sealed body lies at `output`, durably."""
    began = time.monotonic()
    cell = int(Path(job.source.path).read_text())
    delta = bytearray(4 * dimension(job.layout))
    delta[4 * cell : 4 * cell + 4] = _ONE
    encapsulation, sealed = sealing.seal(
        PlainBody(EXAMPLES, 1, METRICS, HOLDOUT), memoryview(delta), job.hpke_key, job.context
    )
    write_durably(Path(job.output), sealed)
    return Done(
        job.id,
        encapsulation,
        len(sealed),
        hashlib.sha256(sealed).digest(),
        EXAMPLES,
        1,
        HOLDOUT,
        METRICS,
        1.0,
        1.0,
        time.monotonic() - began,
        time.process_time(),
        0,
    )


def main() -> None:
    """Until stdin ends. To cancel or to suspend comes too late for work that takes no time."""
    orders, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while (order := jobs.read_order(orders)) is not None:
        if isinstance(order, Job):
            answers.write(jobs.frame(Said(do(order))))
            answers.flush()


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        sys.exit(0)  # the agent is gone
