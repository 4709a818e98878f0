"""tests/mutants: every mutant still fits the source, so that `make mutants` breaks what it names."""

import re
from functools import cache
from pathlib import Path

import pytest

from tests import mutants
from tests.mutants import ROOT, Mutant

MUTANTS = mutants.load()
PROMISED = {
    *("signature", "role", "rollback", "allow_list", "argument", "duplicate", "selection", "acl", "nan", "limit"),
    *("offer", "expiry", "digest", "graph_limit", "layout", "weights", "norm", "dimension", "sealing", "certificate"),
    *(
        "canonical",
        "order",
        "chunks",
        "poison",
        "disk",
        "policy",
        "conditions",
        "trainer",
        "data",
        "identity",
        "config",
    ),
}


@cache
def text(file: str) -> str:
    """A file of this tree."""
    return (ROOT / file).read_text()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_it_fits_the_source(mutant: Mutant) -> None:
    """Its text is there exactly once, what it makes is another program that compiles, and its tests exist."""
    changed = mutant.apply(text(mutant.file))
    assert changed != text(mutant.file)
    if mutant.file.endswith(".py"):
        compile(changed, mutant.file, "exec")
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert not name or re.search(rf"^def {re.escape(name.partition('[')[0])}\(", text(file), re.MULTILINE), test


def test_every_guard_has_its_mutants() -> None:
    """No guard that we promise to break is without a mutant, and no mutant is there twice."""
    assert {mutant.guard for mutant in MUTANTS} >= PROMISED
    assert len({(mutant.file, mutant.old, mutant.new, mutant.tests) for mutant in MUTANTS}) == len(MUTANTS)


def test_a_mutant_that_does_not_apply() -> None:
    """A text that is not there, or there twice, is an error and never a silent nothing."""
    mutant = Mutant("guard", "name", "file.py", "if bad:", "if False:", ("tests/unit/test_mutants.py",))
    assert mutant.apply("if bad:\n    stop()\n") == "if False:\n    stop()\n"
    for source in ("", "if bad:\nif bad:\n"):
        with pytest.raises(ValueError, match=r"guard\.name"):
            mutant.apply(source)


@pytest.mark.parametrize(
    ("status", "output", "verdict"),
    [
        (1, "...\nFAILED tests/unit/test_x.py::test_y - AssertionError\n", "killed"),
        (0, "1 passed", "survived"),
        (1, "ERROR tests/unit/test_x.py::test_y - ConfigError\n", "broken"),
        (2, "ERROR tests/unit/test_x.py\n", "broken"),
        (4, "ERROR: not found\n", "broken"),
        (5, "no tests ran", "broken"),
        (None, "...", "broken"),
    ],
)
def test_only_a_failed_test_kills(status: int | None, output: str, verdict: str) -> None:
    """A module that cannot be imported, a broken fixture, a missing test or a hang proves nothing about a guard."""
    assert mutants._verdict(status, output)[0] == verdict


def test_choosing() -> None:
    """By guard, by name or by a pattern; a word that fits nothing is an error."""
    assert {mutant.guard for mutant in mutants.chosen(MUTANTS, ["acl"])} == {"acl"}
    assert [mutant.id for mutant in mutants.chosen(MUTANTS, ["nan.metrics"])] == ["nan.metrics"]
    assert len(mutants.chosen(MUTANTS, ["*.nan*", "norm"])) > 2
    assert mutants.chosen(MUTANTS, []) == MUTANTS
    with pytest.raises(SystemExit, match="nothing"):
        mutants.chosen(MUTANTS, ["nothing"])


def test_the_copy(tmp_path: Path) -> None:
    """A process of the copy imports the copy's modules, and a mutant is gone again after its turn."""
    for package in mutants.PACKAGES:
        (tmp_path / "copy" / package).mkdir(parents=True)
        (tmp_path / "copy" / package / "__init__.py").touch()
    (tmp_path / "copy" / "shared" / "one.py").write_text("ONE = 1\n")
    (tmp_path / "copy" / "tests" / "test_one.py").write_text(
        "from shared.one import ONE\n\n\ndef test_one():\n    assert ONE == 1\n"
    )
    copy = mutants.Copy(tmp_path / "copy")
    copy.check_imports()
    mutant = Mutant("guard", "name", "shared/one.py", "1", "2", ("tests/test_one.py",))
    result = copy.judge(mutant)
    assert (result.verdict, result.words) == ("killed", "tests/test_one.py::test_one")
    assert (tmp_path / "copy" / "shared" / "one.py").read_text() == "ONE = 1\n"
    assert copy.pytest(mutant.tests)[0] == 0
    assert copy.judge(Mutant("guard", "other", "shared/one.py", "1", "1.0", mutant.tests)).verdict == "survived"
