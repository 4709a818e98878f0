"""`make bench`: measure, print a table, write build/bench/report.json.

What is real: mosquitto with TLS 1.3 and client certificates, the installed aggregator and agents with their trainers,
signatures, sealing, fsync. What is left out stands in bench/README.md. Absolute figures are never a test.
"""

import argparse
import compileall
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from bench import distribution, ingest, kernels, rounds
from bench.fleet import HERE, BenchError
from bench.report import Figure, document, table
from shared.errors import FieldfareError

ROOT = HERE.parent
OUT = ROOT / "build" / "bench"
PUBLISHED = ROOT / "docs" / "benchmarks.md"

_LIBRARIES = ("cryptography", "msgpack", "msgspec", "numpy", "paho-mqtt", "SQLAlchemy", "structlog", "torch")

PEERS = """\
| same model, trivial training, loopback | Flower 1.41 (2 / 10 nodes) | NVFlare 2.9 POC | bare MQTT, TLS + AES-GCM |
|----------------------------------------|----------------------------|-----------------|--------------------------|
| seconds a round                        | 6.8 / 17                   | 2.6 / 2.7       | 0.06 / 0.25              |
| server CPU a round, s                  | 1.35 / 5.6                 | 0.15 / 0.6      | 0.03 / 0.12              |
| client CPU a round, s                  | 1.3 to 1.8                 | 0.03 to 0.08    | 0.013                    |
| idle client, resident MB               | 257                        | 84              | 32                       |
| server, resident MB                    | 451 / 579                  | 450 / 550       | 76                       |
| uplink a client, MB                    | 4.12                       | about 4         | 4                        |
| fold, GB of a CPU-second               | 1.7 to 7                   | 10 to 17        |                          |
"""


def main() -> int:
    """Run it; the exit status is 0 also when goals are missed: they are news, not faults."""
    options = argparse.ArgumentParser(prog="make bench", description=__doc__.splitlines()[0])
    options.add_argument("--devices", type=int, nargs="*", default=[2, 10], help="agents in each measurement of rounds")
    options.add_argument("--rounds", type=int, default=12, help="rounds that count, after the warm-up (default 12)")
    options.add_argument("--idle", type=float, default=20.0, help="seconds of looking at the idle agents (default 20)")
    options.add_argument("--ingest", type=int, default=3, help="rounds of each kind of ingest (default 3)")
    options.add_argument("--memory", type=int, nargs="*", default=[10, 100, 1000], help="updates in one round")
    options.add_argument("--distribution", type=int, nargs="*", default=[100], help="devices that get a release")
    options.add_argument("--keep", action="store_true", help="leave the fleets' folders and logs there")
    options.add_argument("--publish", action="store_true", help=f"also write {PUBLISHED.relative_to(ROOT)}")
    options.add_argument("--out", type=Path, default=OUT, help="the report's folder (default build/bench)")
    given = options.parse_args()
    out = given.out.resolve()
    work = out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for package in ("shared", "edge_agent", "aggregator"):
        # As an installed package is: who compiles what it imports needs 4 MB more.
        compileall.compile_dir(ROOT / package, quiet=2)
    began, load = time.monotonic(), os.getloadavg()
    try:
        figures = _measure(work, given)
    except (BenchError, FieldfareError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    about: dict[str, object] = {
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "load_before": load[0],
        "seconds": round(time.monotonic() - began, 1),
        "versions": _versions(),
        "options": {name: value for name, value in vars(given).items() if name not in ("keep", "publish", "out")},
    }
    (out / "report.json").write_text(json.dumps(document(figures, about), indent=1) + "\n", encoding="utf-8")
    text = table(figures)
    print(text)
    missed = [figure for figure in figures if figure.reached is False]
    print(
        f"{sum(figure.reached is True for figure in figures)} goals reached, {len(missed)} not; {out / 'report.json'}"
    )
    if given.publish:
        PUBLISHED.write_text(_page(text, about), encoding="utf-8")
        print(f"written: {PUBLISHED}")
    if not given.keep:
        shutil.rmtree(work)
    return 0


def _measure(work: Path, given: argparse.Namespace) -> list[Figure]:
    figures = []
    for position, devices in enumerate(given.devices):
        _say(f"{given.rounds} rounds with {devices} agents")
        figures += rounds.measure(work / f"rounds-{devices}", devices, given.rounds, 0 if position else given.idle)
    if given.ingest:
        _say("rounds with 100 and 200 updates")
        figures += ingest.rates(work / "ingest", given.ingest)
    if given.memory:
        _say(f"rounds with {', '.join(map(str, given.memory))} updates")
        figures += ingest.memory(work / "memory", given.memory)
    for devices in given.distribution:
        _say(f"a release to {devices} devices")
        figures += distribution.measure(work / f"distribution-{devices}", devices)
    _say("fold, steps of an update, disk")
    (work / "kernels").mkdir()
    return figures + kernels.measure(work / "kernels")


def _say(what: str) -> None:
    print(f"bench: {what} ...", file=sys.stderr, flush=True)


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True).stdout.strip()

    # The page that this command writes is no change of what it measures.
    changed = git("status", "--porcelain", "--", ".", f":!{PUBLISHED.relative_to(ROOT)}")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (" with changes" if changed else "")


def _machine() -> dict[str, object]:
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(memory[1]) / 1e6, 1) if memory else None,
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
    }


def _versions() -> dict[str, str]:
    broker = subprocess.run(["mosquitto", "-h"], capture_output=True, text=True).stdout.partition("\n")[0]
    found = {name: importlib.metadata.version(name) for name in ("fieldfare", *_LIBRARIES)}
    return {"python": platform.python_version(), **found, "mosquitto": broker.rpartition(" ")[2]}


def _page(text: str, about: dict[str, object]) -> str:
    machine, versions = about["machine"], about["versions"]
    assert isinstance(machine, dict) and isinstance(versions, dict)
    library = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"""\
# Benchmarks

Written by `make bench ARGS=--publish`; [bench/README.md](../bench/README.md) tells what is measured and left out.
Medians, with the least and the greatest of `n` measurements; "reached" compares the median with the goal.

Commit {about["commit"]}, {about["date"]}; {machine["cpu"]}, {machine["cores"]} cores, \
{machine["memory_gb"]} GB, {machine["system"]}; load average before: {about["load_before"]:.1f}.
{library}.

{text}
## Others

Quoted from measurements made in 2026-11 on another machine (2 Zen 5 cores), so not to be divided by the figures above;
"bare MQTT" has neither durability nor a trainer.

{PEERS}"""


if __name__ == "__main__":
    sys.exit(main())
