"""The task file: the TOML in which a publisher says what is learnt, from which data and in which rounds.

It turns the file into a TaskManifest. It never opens a network connection, a key or a model.
Times are seconds, as in every file of Fieldfare.
"""

import re
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from msgspec import UNSET, Meta

from shared import config
from shared.config import Section
from shared.errors import ConfigError
from shared.messages import (
    Above,
    Adam,
    ClippedMean,
    Conditions,
    DataContract,
    FedAvg,
    Fraction,
    Gate,
    MeanServer,
    Metric,
    Name,
    NotBelow,
    Plan,
    Positive,
    PrivacyNone,
    Sgd,
    TaskManifest,
    TensorSpec,
    Training,
    VerificationKey,
)

DAY = 86_400
LONGEST_DAYS = 3660
"""No task is trained for longer."""

_DAYS = re.compile(r"([0-9]{1,4})d")


class Expiry:
    """a number of days such as "90d", or a date such as "2027-03-01", in quotes."""

    # Not a dataclass: msgspec would want a table for one.
    def __init__(self, text: str) -> None:
        """Raises ValueError where `text` is neither."""
        found = _DAYS.fullmatch(text)
        self._text = text
        self._days = int(found[1]) if found else None
        self._date = None if found else date.fromisoformat(text)

    @classmethod
    def parse(cls, text: str) -> Self:
        """As a configuration's value."""
        return cls(text)

    def __str__(self) -> str:
        return self._text

    def after(self, now: float) -> int:
        """UTC seconds: so many days after `now`, or the midnight (UTC) at which the date begins."""
        if self._date is None:
            return int(now) + (self._days or 0) * DAY
        return int(datetime(self._date.year, self._date.month, self._date.day, tzinfo=UTC).timestamp())


class TrainingSection(Section, frozen=True, kw_only=True):
    """`[training]`: what a device does with its data in one round."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: Above
    """Learning rate."""
    momentum: Fraction = 0.0
    """sgd only."""
    beta1: Fraction = 0.9
    """adam only, as beta2 and eps are."""
    beta2: Fraction = 0.999
    eps: Above = 1e-8
    weight_decay: NotBelow = 0.0
    batch_size: Annotated[int, Meta(ge=1, le=65_536)]
    """Examples."""
    epochs: Annotated[int, Meta(ge=0, le=10_000)] = 0
    """Passes over the local data in a round; give this or `steps`."""
    steps: Annotated[int, Meta(ge=0, le=10_000_000)] = 0
    """Optimizer steps in a round; give this or `epochs`."""
    gradient_clip: NotBelow = 0.0
    """L2 norm that each step's gradient is clipped to; 0 does not clip."""
    holdout: Annotated[float, Meta(ge=0.0, le=0.9)] = 0.2
    """Share of the local examples that is never trained on and gives the metrics."""


class PlanSection(Section, frozen=True, kw_only=True):
    """`[plan]`: the rounds."""

    goal: Annotated[int, Meta(ge=1, le=1_000_000)]
    """Accepted updates that close a round."""
    min_updates: Annotated[int, Meta(ge=1, le=1_000_000)]
    """Fewest that make a release at the deadline."""
    rounds: Annotated[int, Meta(ge=1, le=10_000_000)]
    """After so many the task is finished."""
    deadline: Annotated[int, Meta(ge=1, le=10_000_000)]
    """Seconds from a round's opening."""
    max_extension: Annotated[int, Meta(ge=1, le=10_000_000)] = 86_400
    """Seconds that a round with too few updates is extended at the most, at a time."""
    over_select: Annotated[float, Meta(ge=1.0, le=100.0)] = 1.3
    """Devices asked for each update wanted."""
    max_staleness: Literal[0] = 0
    """Updates count in their own round."""
    start_jitter: Annotated[int, Meta(ge=0, le=86_400)] = 0
    """Seconds over which devices spread their start."""
    until: Annotated[float, Meta(ge=-1e12, le=1e12)] | None = None
    """Value of `metric` at which the task is finished before its last round."""
    gate: Gate | bool = True
    """Whether, or when, a release that is clearly worse than the one before is taken back; a table or false."""

    def plan(self) -> Plan:
        """As the manifest has it."""
        gate = Gate() if self.gate is True else UNSET if self.gate is False else self.gate
        return Plan(
            goal=self.goal,
            min_updates=self.min_updates,
            rounds=self.rounds,
            deadline=self.deadline,
            max_extension=self.max_extension,
            over_select=self.over_select,
            max_staleness=self.max_staleness,
            start_jitter=self.start_jitter,
            until=UNSET if self.until is None else self.until,
            gate=gate,
        )


class ConditionsSection(Section, frozen=True, kw_only=True):
    """`[conditions]`: what is asked of a device beyond its owner's policy."""

    mains: bool = False
    """On mains, or charging."""
    idle: bool = False
    """CPUs at least as idle as the default policy asks."""
    min_battery: Annotated[int, Meta(ge=0, le=100)] = 0
    """Percent, of a device that has a battery."""
    idle_user: bool = False
    """Nobody uses the device, as far as its desktop knows."""
    unmetered: bool = False
    """The network does not count bytes."""

    def conditions(self) -> Conditions:
        """As the manifest has it."""
        return Conditions(
            mains=self.mains,
            idle=self.idle,
            min_battery=self.min_battery,
            idle_user=self.idle_user or UNSET,
            unmetered=self.unmetered or UNSET,
        )


class TaskFile(Section, frozen=True, kw_only=True):
    """A whole task file. `[data]` has the keys of the manifest's part of that name."""

    name: Name
    """Of the task, in topics and commands."""
    version: Positive = 1
    """Raise it with every change of the file or the model: devices and aggregator refuse a lower one."""
    expires: Expiry = Expiry("365d")
    """When training ends for good, counted from the building of the release; the model stays usable."""
    metric: Metric = "loss"
    """What the hold-outs are judged by."""
    clip: Above = 10.0
    """Bound on the L2 norm of one device's whole update. Small models give 0.5 to 5, so that the default bites only on
    what is broken or hostile; three times the norms you see is a good value."""
    weights: Literal["examples", "uniform"] = "examples"
    """How updates are weighed in the mean."""
    cap: Positive = 10_000
    """Examples of one device that count at most where `weights` is "examples"."""
    server_lr: Above = 1.0
    """The aggregator adds this times the mean update to the weights."""
    training: TrainingSection
    data: DataContract
    plan: PlanSection
    conditions: ConditionsSection = ConditionsSection()


def load(path: Path) -> TaskFile:
    """Read and check a task file; raises ConfigError naming file, key and what is allowed."""
    if not path.exists():
        raise ConfigError(str(path), "", "there is no such file; name the task file with --task")
    task = config.load(path, TaskFile)
    _check(path, task)
    return task


def manifest(
    path: Path,
    task: TaskFile,
    *,
    now: float,
    opset: int,
    train_graph: bytes,
    eval_graph: bytes,
    layout: list[TensorSpec],
    aggregator_keys: list[VerificationKey],
) -> TaskManifest:
    """The manifest of a task file that was read from `path`; `now` is UTC seconds, the graphs are their digests.

    Raises ConfigError where `expires` is not ahead, at most ten years.
    """
    expires = task.expires.after(now)
    if not now < expires <= now + LONGEST_DAYS * DAY:
        raise ConfigError(str(path), "expires", f"{task.expires} is not within ten years from now; write a later date")
    plan, conditions = task.plan.plan(), task.conditions.conditions()
    return TaskManifest(
        v=1 if plan.until is UNSET and plan.gate is UNSET and not conditions.grown else 2,
        task=task.name,
        version=task.version,
        expires=expires,
        opset=opset,
        train_graph=train_graph,
        eval_graph=eval_graph,
        layout=layout,
        training=_training(task.training),
        algorithm=FedAvg(weights=task.weights, cap=task.cap),
        server=MeanServer(lr=task.server_lr),
        data=task.data,
        plan=plan,
        codec="fp32",
        rule=ClippedMean(),
        privacy=PrivacyNone(clip_max=task.clip),
        conditions=conditions,
        aggregator_keys=aggregator_keys,
        metric=task.metric,
    )


def _check(path: Path, task: TaskFile) -> None:
    """The rules between keys."""

    def refuse(key: str, advice: str) -> ConfigError:
        return ConfigError(str(path), key, advice)

    training, plan, data = task.training, task.plan, task.data
    if (training.epochs > 0) == (training.steps > 0):
        raise refuse("training.epochs", "give exactly one of epochs (passes over the data) and steps (optimizer steps)")
    adam, plain = Adam(lr=training.lr), Sgd(lr=training.lr)
    misplaced = (
        {"momentum": training.momentum != plain.momentum}
        if training.optimizer == "adam"
        else {
            "beta1": training.beta1 != adam.beta1,
            "beta2": training.beta2 != adam.beta2,
            "eps": training.eps != adam.eps,
        }
    )
    for key, found in misplaced.items():
        if found:
            raise refuse(f"training.{key}", f'optimizer = "{training.optimizer}" has no such setting; remove it')
    if plan.min_updates > plan.goal:
        raise refuse("plan.min_updates", f"must be from 1 to goal, which is {plan.goal}; it is {plan.min_updates}")
    arrays = {f"data.inputs[{number}]": one for number, one in enumerate(data.inputs)} | {"data.target": data.target}
    names = [one.name for one in arrays.values()]
    for key, one in arrays.items():
        if names.count(one.name) > 1:
            raise refuse(f"{key}.name", f'"{one.name}" names two arrays; every input and the target needs its own name')
        if one.classes and one.dtype not in ("int64", "int32", "uint8"):
            raise refuse(f"{key}.classes", f'only "int64", "int32" and "uint8" hold classes, not "{one.dtype}"')
        if 0 in one.shape:
            raise refuse(f"{key}.shape", "no dimension may be 0; leave the batch dimension out altogether")
    if task.metric == "accuracy" and not data.target.classes:
        raise refuse("metric", '"accuracy" needs data.target.classes; without: "binary_accuracy", "rmse" or "loss"')


def _training(section: TrainingSection) -> Training:
    optimizer: Sgd | Adam
    if section.optimizer == "sgd":
        optimizer = Sgd(lr=section.lr, momentum=section.momentum, weight_decay=section.weight_decay)
    else:
        optimizer = Adam(
            lr=section.lr,
            beta1=section.beta1,
            beta2=section.beta2,
            eps=section.eps,
            weight_decay=section.weight_decay,
        )
    return Training(
        optimizer=optimizer,
        batch_size=section.batch_size,
        epochs=section.epochs,
        steps=section.steps,
        gradient_clip=section.gradient_clip,
        holdout=section.holdout,
    )
