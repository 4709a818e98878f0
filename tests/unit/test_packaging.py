"""What is installed is what was meant: metadata, lock, declared modules, templates, and imports that stay light."""

import configparser
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from shared.cli import MEANING
from shared.version import VERSION

ROOT = Path(__file__).parents[2]
PACKAGES = ("shared", "edge_agent", "aggregator")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# The shell: modules that may touch network, disk, clock, threads or processes. All others are pure (setup.cfg).
SHELL = {
    "shared.cli",
    "shared.config",
    "shared.control",
    "shared.driver",
    "shared.files",
    "shared.identity",
    "shared.logs",
    "shared.mqtt",
    "shared.receive",
    "shared.spool",
    "shared.systemd",
    "edge_agent.budget",
    "edge_agent.bugreport",
    "edge_agent.bus",
    "edge_agent.checkpoint",
    "edge_agent.child",
    "edge_agent.cli",
    "edge_agent.clock",
    "edge_agent.config",
    "edge_agent.confined",
    "edge_agent.control",
    "edge_agent.data",
    "edge_agent.doctor",
    "edge_agent.enrol",
    "edge_agent.install",
    "edge_agent.interpreter",
    "edge_agent.lean",
    "edge_agent.libraries",
    "edge_agent.local",
    "edge_agent.outbox",
    "edge_agent.pressure",
    "edge_agent.renewal",
    "edge_agent.sandbox",
    "edge_agent.schedule",
    "edge_agent.sensors",
    "edge_agent.service",
    "edge_agent.shelf",
    "edge_agent.store",
    "edge_agent.trainer",
    "edge_agent.trial",
    "edge_agent.words",
    "aggregator.backup",
    "aggregator.blobs",
    "aggregator.broker",
    "aggregator.ca",
    "aggregator.cli",
    "aggregator.config",
    "aggregator.control",
    "aggregator.deny",
    "aggregator.distribution",
    "aggregator.download",
    "aggregator.export",
    "aggregator.journal",
    "aggregator.intake",
    "aggregator.model",
    "aggregator.ports",
    "aggregator.publish",
    "aggregator.quarantine",
    "aggregator.registrar",
    "aggregator.registry_store",
    "aggregator.release",
    "aggregator.service",
    "aggregator.sqlite",
    "aggregator.store",
    "aggregator.task",
}


def canonical(name: str) -> str:
    """The name of a distribution as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, str]:
    """Name -> version of every package in the lock."""
    text = (ROOT / "requirements" / "lock.txt").read_text()
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE))


def declared() -> set[str]:
    """Every distribution named by pyproject.toml, extras included."""
    listed = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return {canonical(re.split(r"[^A-Za-z0-9_.-]", one, maxsplit=1)[0]) for many in listed for one in many}


def pure_modules() -> set[str]:
    """The modules that the import contract holds to be pure."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return set(config["importlinter:contract:pure"]["source_modules"].split())


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter, from the repository's root."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_version_has_one_source() -> None:
    """The installed metadata carries the version that shared/version.py states."""
    assert importlib.metadata.version("fieldfare") == VERSION
    assert f"## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text()


def test_documented_exit_codes_are_the_real_ones() -> None:
    """docs/stability.md lists every exit code of the commands with its meaning, and no other."""
    table = re.findall(r"^\| (\d+) \| (.+) \|$", (ROOT / "docs" / "stability.md").read_text(), re.MULTILINE)
    assert table == [(str(code.value), text) for code, text in MEANING.items()]


def test_lock_covers_every_dependency_but_torch() -> None:
    """`pip install --no-deps` of the lock and of torch leaves nothing out."""
    assert declared() - set(locked()) == {"torch"}


def test_lock_has_torchs_own_dependencies() -> None:
    """torch is installed with --no-deps, so what it requires on a CPU must be in the lock."""
    needed = set()
    for line in importlib.metadata.requires("torch") or ():
        requirement, _, marker = line.partition(";")
        if "extra" not in marker:
            needed.add(canonical(re.split(r"[^A-Za-z0-9_.-]", requirement.strip(), maxsplit=1)[0]))
    assert needed and needed <= set(locked())


def test_lock_is_hashed_and_names_no_index() -> None:
    """Every locked package has a hash; no address of an index, no path of a machine slips in."""
    blocks = re.split(r"^(?=[a-z0-9-]+==)", (ROOT / "requirements" / "lock.txt").read_text(), flags=re.MULTILINE)[1:]
    assert len(blocks) == len(locked())
    assert [block.split()[0] for block in blocks if "--hash=sha256:" not in block] == []
    assert re.findall(r"://|--(?:extra-)?index|--find-links|/home|/tmp", "".join(blocks)) == []


def test_torch_is_pinned_exactly() -> None:
    """One version of torch, and pyproject.toml allows it."""
    pins = re.findall(r"^torch==(\d+\.\d+)\.\d+$", (ROOT / "requirements" / "torch.txt").read_text(), re.MULTILINE)
    assert len(pins) == 1
    for extra in ("train", "publish"):
        (wanted,) = (one for one in PROJECT["optional-dependencies"][extra] if one.startswith("torch"))
        assert f">={pins[0]}" in wanted


def test_resident_agent_requires_nothing_heavy() -> None:
    """A plain `pip install fieldfare` on a device brings neither torch nor numpy, nor what only servers use."""
    base = {canonical(re.split(r"[^A-Za-z0-9_.-]", one, maxsplit=1)[0]) for one in PROJECT["dependencies"]}
    assert base.isdisjoint({"torch", "numpy", "rich", "safetensors", "scikit-learn", "sqlalchemy", "zstandard"})


def test_every_module_is_pure_or_shell() -> None:
    """A new module is declared: pure in setup.cfg's contract, or part of the shell in the list above."""
    present = {f"{p}.{f.stem}" for p in PACKAGES for f in (ROOT / p).glob("*.py") if f.stem != "__init__"}
    pure = pure_modules()
    assert present - pure - SHELL == set(), "declare these"
    assert pure & SHELL == set(), "these cannot be both"
    assert SHELL - present == set(), "these are gone"


def test_packages_are_flat_and_typed() -> None:
    """setup.cfg lists the packages by name, so a nested one would be left out of the wheel; all carry py.typed."""
    for package in PACKAGES:
        assert [str(one) for one in (ROOT / package).glob("*/**/*.py")] == []
        assert files(package).joinpath("py.typed").is_file()


@pytest.mark.parametrize("folder", ["mosquitto", "systemd"])
@pytest.mark.parametrize("where", [ROOT, Path("/")], ids=["root", "elsewhere"])
def test_templates_are_resources_of_the_aggregator(folder: str, where: Path) -> None:
    """The top-level folder is reached as a resource, from the repository's root too, where it could be shadowed."""
    listing = f"sorted(one.name for one in files('aggregator._{folder}').iterdir())"
    code = f"from importlib.resources import files; print(*{listing})"
    said = subprocess.run([sys.executable, "-c", code], cwd=where, capture_output=True, text=True, check=True).stdout
    there = sorted(one.name for one in (ROOT / folder).iterdir())
    assert there and said.split() == there


# Imports with some modules absent. `None` in sys.modules makes Python raise ModuleNotFoundError, as an absent one does.
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({absent!r})); import {module}; print('imported')"

LINUX_ONLY = ["fcntl", "grp", "pwd", "resource", "syslog", "termios"]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("edge_agent.service", ["torch", "numpy", "scipy", "safetensors", "sqlalchemy", "rich", "zstandard"]),
        ("edge_agent.cli", ["torch", "numpy", "scipy", "safetensors", "sqlalchemy", "rich", "zstandard"]),
        ("aggregator.service", ["torch", "apscheduler"]),
        ("aggregator.cli", ["torch", "apscheduler", *LINUX_ONLY]),
        ("aggregator.export", LINUX_ONLY),
        ("aggregator.publish", LINUX_ONLY),
        ("aggregator.release", LINUX_ONLY),
    ],
)
def test_imports_with_modules_absent(module: str, absent: list[str]) -> None:
    """Resident agent: no torch, no numpy. Daemon: no torch. Building and publishing: nothing that is Linux only."""
    ran = python(WITHOUT.format(absent=absent, module=module))
    assert ran.stdout == "imported\n", ran.stderr


def test_import_blocker_blocks() -> None:
    """The test above can fail: a module that needs torch does not import without it."""
    ran = python(WITHOUT.format(absent=["torch"], module="edge_agent.interpreter"))
    assert ran.returncode == 1 and "ModuleNotFoundError" in ran.stderr and ran.stdout == ""
