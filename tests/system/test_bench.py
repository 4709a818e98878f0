"""The benchmark runs for real, small: every part measures something and reports it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.daemon import LEASH

ROOT = Path(__file__).parents[2]

SECTIONS = {
    "Idle agent",
    "Round, 2 devices",
    "Where a round goes, 2 devices",
    "Ingest, 2 devices in one round",
    "A release of 4.0 MB to 3 devices",
    "Fold",
    "Steps of one 4 MB update, CPU",
    "One 4 MB update through the aggregator, no network",
    "The disk alone (one file and fdatasync each)",
}

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None,
        reason="needs mosquitto: sudo apt-get install mosquitto",
    ),
]


def test_bench_reports_every_section(tmp_path: Path) -> None:
    """Idle agents, rounds, ingest, fold, steps and disk: each has figures, in report.json and in the table."""
    options = [
        "--devices",
        "2",
        "--rounds",
        "1",
        "--idle",
        "2",
        "--ingest",
        "2",
        "--distribution",
        "3",
        "--out",
        str(tmp_path),
    ]
    ran = subprocess.run(
        [*LEASH, sys.executable, "-m", "bench.run", *options], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    groups = {figure["group"] for figure in found["figures"]}
    assert groups == SECTIONS
    for figure in found["figures"]:
        assert figure["values"] and f"| {figure['name']} " in ran.stdout
    for group in groups:
        assert f"### {group}\n" in ran.stdout
    assert not (tmp_path / "work").exists()
