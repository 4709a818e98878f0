"""aggregator.task: every rule of the task file, and what becomes of a good one."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from aggregator import task
from shared import wire
from shared.errors import ConfigError
from shared.messages import Adam, Key, Sgd, TaskManifest, TensorSpec, Use, VerificationKey

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits" / "task.toml"
NOW = datetime(2026, 11, 21, tzinfo=UTC).timestamp()
KEY: Key = bytes(32)

GOOD = """\
name = "wear"
version = 3

[training]
lr = 0.1
batch_size = 16
epochs = 2

[data]
dataset = "bearings"
inputs = [{ name = "x", dtype = "float32", shape = [6] }]
target = { name = "y", dtype = "int64", shape = [], classes = 4 }

[plan]
goal = 8
min_updates = 6
rounds = 15
deadline = 600
"""


def _write(folder: Path, text: str) -> Path:
    path = folder / "task.toml"
    path.write_text(text, encoding="utf-8")
    return path


def _manifest(path: Path, now: float = NOW) -> TaskManifest:
    return task.manifest(
        path,
        task.load(path),
        now=now,
        opset=1,
        train_graph=bytes(32),
        eval_graph=bytes(32),
        layout=[TensorSpec(name="w", kind="parameter", dtype="float32", shape=[2])],
        aggregator_keys=[VerificationKey(key=KEY, uses=[Use.OFFER])],
    )


def test_a_good_file_becomes_a_manifest(tmp_path: Path) -> None:
    """Every value of the file is in the manifest, and what is not said has the documented default."""
    made = _manifest(_write(tmp_path, GOOD))
    assert (made.task, made.version, made.metric, made.privacy.clip_max) == ("wear", 3, "loss", 10.0)
    assert made.training.optimizer == Sgd(lr=0.1)
    assert (made.training.epochs, made.training.steps, made.training.holdout) == (2, 0, 0.2)
    assert (made.plan.goal, made.plan.min_updates, made.plan.deadline, made.plan.over_select) == (8, 6, 600, 1.3)
    assert made.data.dataset == "bearings" and made.data.target.classes == 4
    assert made.expires == NOW + 365 * task.DAY


def test_the_manifest_crosses_the_wire(tmp_path: Path) -> None:
    """What a task file allows, the strict codec allows too."""
    made = _manifest(_write(tmp_path, GOOD))
    assert wire.unpack(wire.pack(made), TaskManifest) == made


def test_the_example_loads() -> None:
    """The demo's task is a valid task file with the figures that the documentation names."""
    made = _manifest(EXAMPLE)
    assert (made.task, made.plan.goal, made.plan.rounds) == ("digits", 8, 15)
    assert (made.training.epochs, made.training.batch_size, made.training.optimizer) == (3, 16, Sgd(lr=0.1))
    assert made.metric == "accuracy"


def test_conditions_that_came_later_need_the_later_protocol(tmp_path: Path) -> None:
    """A task that asks for none of them has the bytes that every device understands, also where it says so."""
    plain = GOOD.replace("[plan]", "[plan]\ngate = false")
    older = _manifest(_write(tmp_path, plain))
    assert older.v == 1
    said = _manifest(_write(tmp_path, f"{plain}\n[conditions]\nidle_user = false\nunmetered = false"))
    assert wire.pack(said) == wire.pack(older)
    for key in ("idle_user", "unmetered"):
        newer = _manifest(_write(tmp_path, f"{plain}\n[conditions]\n{key} = true"))
        assert newer.v == 2
        assert getattr(newer.conditions, key) is True
        assert wire.unpack(wire.pack(newer), TaskManifest) == newer


def test_adam_takes_its_own_settings(tmp_path: Path) -> None:
    """Settings of adam that are given are used, the others keep their defaults."""
    text = GOOD.replace("lr = 0.1", 'optimizer = "adam"\nlr = 0.01\nbeta2 = 0.99\nweight_decay = 0.1')
    assert _manifest(_write(tmp_path, text)).training.optimizer == Adam(lr=0.01, beta2=0.99, weight_decay=0.1)


@pytest.mark.parametrize(
    ("written", "expires"),
    [
        ("90d", NOW + 90 * task.DAY),
        ("1d", NOW + task.DAY),
        ("2027-03-01", datetime(2027, 3, 1, tzinfo=UTC).timestamp()),
    ],
)
def test_expiry_is_days_or_a_date(tmp_path: Path, written: str, expires: float) -> None:
    """Days count from the building, a date begins at its midnight in UTC."""
    assert _manifest(_write(tmp_path, f'expires = "{written}"\n{GOOD}')).expires == expires


@pytest.mark.parametrize("written", ["2020-01-01", "2026-11-21", "2099-01-01", "0d", "9999d"])
def test_expiry_lies_ahead(tmp_path: Path, written: str) -> None:
    """A time that is past, now, or over ten years away is refused with file and key."""
    with pytest.raises(ConfigError) as refused:
        _manifest(_write(tmp_path, f'expires = "{written}"\n{GOOD}'))
    assert (refused.value.path, refused.value.key) == (str(tmp_path / "task.toml"), "expires")


@pytest.mark.parametrize(
    ("old", "new", "key", "advice"),
    [
        ('name = "wear"', 'name = "Wear"', "name", "[a-z0-9]"),
        ('name = "wear"', 'name = "_wear"', "name", "[a-z0-9]"),
        ("version = 3", "version = 0", "version", "from 1"),
        ("version = 3", 'version = "3"', "version", "whole number"),
        ("version = 3", 'expires = "soon"', "expires", "90d"),
        ("version = 3", "expires = 90", "expires", "90d"),
        ("version = 3", 'metric = "f1"', "metric", '"rmse"'),
        ("version = 3", "clip = 0", "clip", "above 0"),
        ("version = 3", 'weights = "equal"', "weights", '"uniform"'),
        ("version = 3", "cap = 0", "cap", "from 1"),
        ("version = 3", "server_lr = -1.0", "server_lr", "above 0"),
        ("version = 3", "priority = 1", "priority", "not a known key"),
        ('name = "wear"\n', "", "name", "missing"),
        ("lr = 0.1\n", "", "training.lr", "missing"),
        ("lr = 0.1", "lr = 0", "training.lr", "above 0"),
        ("lr = 0.1", 'lr = 0.1\noptimizer = "rmsprop"', "training.optimizer", '"adam"'),
        ("lr = 0.1", "lr = 0.1\nbeta1 = 0.8", "training.beta1", "remove"),
        ("lr = 0.1", 'lr = 0.1\noptimizer = "adam"\nmomentum = 0.9', "training.momentum", "remove"),
        ("lr = 0.1", "lr = 0.1\nmomentum = 1.5", "training.momentum", "to 1"),
        ("lr = 0.1", "lr = 0.1\nholdout = 0.95", "training.holdout", "0.9"),
        ("lr = 0.1", "lr = 0.1\ngradient_clip = -1.0", "training.gradient_clip", "from 0"),
        ("batch_size = 16", "batch_size = 0", "training.batch_size", "from 1"),
        ("batch_size = 16", "batch_size = 16\nstepz = 4", "training.stepz", "did you mean steps"),
        ("epochs = 2", "epochs = 2\nsteps = 10", "training.epochs", "exactly one"),
        ("epochs = 2\n", "", "training.epochs", "exactly one"),
        ('dataset = "bearings"', 'dataset = "Bearings"', "data.dataset", "[a-z0-9]"),
        ('"float32", shape = [6]', '"bfloat16", shape = [6]', "data.inputs", "bfloat16"),
        ('"float32", shape = [6]', '"float32", shape = [0, 6]', "data.inputs[0].shape", "batch dimension"),
        ('"float32", shape = [6]', '"float32", shape = [6], classes = 3', "data.inputs[0].classes", "float32"),
        ('name = "y"', 'name = "x"', "data.inputs[0].name", "names two arrays"),
        ("classes = 4", "classes = -4", "data.target.classes", "from 0"),
        ("goal = 8", "goal = 0", "plan.goal", "from 1"),
        ("min_updates = 6", "min_updates = 9", "plan.min_updates", "1 to goal"),
        ("rounds = 15", "rounds = 0", "plan.rounds", "from 1"),
        ("deadline = 600", 'deadline = "10m"', "plan.deadline", "whole number"),
        ("deadline = 600", "deadline = 600\nover_select = 0.5", "plan.over_select", "from 1"),
        ("deadline = 600", "deadline = 600\n[conditions]\nmin_battery = 101", "conditions.min_battery", "100"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, old: str, new: str, key: str, advice: str) -> None:
    """Each wrong value is refused with the file, the key and what is allowed."""
    assert old in GOOD
    path = _write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ConfigError) as refused:
        task.load(path)
    assert refused.value.path == str(path)
    assert refused.value.key.startswith(key)
    assert advice in refused.value.advice


def test_accuracy_needs_classes(tmp_path: Path) -> None:
    """Accuracy over a target without classes would mean nothing and is refused."""
    path = _write(tmp_path, 'metric = "accuracy"\n' + GOOD.replace(", classes = 4", ""))
    with pytest.raises(ConfigError, match="binary_accuracy") as refused:
        task.load(path)
    assert refused.value.key == "metric"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A task file that is not there is the operator's to mend."""
    with pytest.raises(ConfigError) as refused:
        task.load(tmp_path / "none.toml")
    assert refused.value.path == str(tmp_path / "none.toml")
