"""What every test shares: deterministic property tests and one torch thread; never a fixture of one module only."""

import os

from hypothesis import settings

# Two cores and many processes: threads inside torch and numpy only take turns. Children inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadline: a busy machine is not a bug. In CI the examples are the same every time.
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("local", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")
