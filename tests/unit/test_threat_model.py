"""docs/threat-model.md: every test that it names is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`(tests/[a-z0-9_/]+\.py)?(?:::(test_[a-z0-9_]+))?`")


def test_every_named_test_exists() -> None:
    """A promise that points to a test which is gone is no promise."""
    rows = [line for line in (ROOT / "docs/threat-model.md").read_text().splitlines() if "`tests/" in line]
    assert len(rows) > 15
    missing = []
    for row in rows:
        file = None
        for path, name in NAMED.findall(row):
            file = path or file
            if not path and not name:
                continue
            source = ROOT / str(file)
            if not source.exists() or (name and f"def {name}(" not in source.read_text()):
                missing.append(f"{file}::{name}" if name else file)
    assert missing == []
