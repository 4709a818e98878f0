"""What a demo found out: the records behind report.json, and the summary for a person."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from examples.digits.data import KNOWN

ENOUGH = 0.70
"""Accuracy below which the demo has failed; about .87 is expected after 15 rounds with 8 devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRecord:
    """One round and the release that it made. Bytes are those of all devices' links during it, TLS included."""

    round: int
    release: int
    accuracy: float
    """Of the release, on all devices' hold-outs together."""
    loss: float
    reported_accuracy: float | None
    """What the devices themselves reported of the release before it."""
    seconds: float
    """From the offer's arrival at the operator to the release's."""
    at: float
    """Seconds since the model was published."""
    bytes_up: int
    bytes_down: int


@dataclass(slots=True, kw_only=True)
class DeviceRecord:
    """One device, as its agent describes itself; bytes are those on the wire, TLS included, memory is resident."""

    name: str
    digits: tuple[int, ...]
    examples: int = 0
    """To train on."""
    held_out: int = 0
    state: str = "starting"
    round: int = 0
    """The last that it trained in."""
    updates: int = 0
    """Accepted ones."""
    bytes_up: int = 0
    bytes_down: int = 0
    agent_memory: int = 0
    trainer_memory: int = 0
    """The highest seen."""
    alone_accuracy: float | None = None
    alone_known: tuple[int, ...] = ()
    """Digits that it knows after training with its own data only."""
    killed_in: int | None = None
    """The round in whose middle it was killed."""
    back_after: float | None = None
    """Seconds from then until it was connected again."""
    before: tuple[int, int, int] = (0, 0, 0)
    """(updates, bytes up, bytes down) that its agent had counted when it was killed."""


@dataclass(slots=True, kw_only=True)
class Report:
    """All figures of a demo."""

    rounds_planned: int
    epochs: int
    images: int
    digits: int
    """Digits in the hold-outs."""
    start_accuracy: float
    rounds: list[RoundRecord]
    devices: list[DeviceRecord]
    digits_known: tuple[int, ...]
    """Those whose images the last release reads as that digit more often than as any other."""
    accuracy_by_digit: dict[int, float]
    aggregator_memory: int
    setup_seconds: float
    training_seconds: float
    total_seconds: float
    places: dict[str, str]

    @property
    def accuracy(self) -> float:
        """Of the last release."""
        return self.rounds[-1].accuracy if self.rounds else self.start_accuracy

    @property
    def passed(self) -> bool:
        """Whether it is enough."""
        return self.accuracy >= ENOUGH

    @property
    def alone(self) -> list[float]:
        """The devices' accuracies with their own data only."""
        return [device.alone_accuracy for device in self.devices if device.alone_accuracy is not None]

    @property
    def seconds(self) -> list[float]:
        """Of every round but the first, in which the trainers start; of the first where it is the only one."""
        return [one.seconds for one in self.rounds[1:] or self.rounds]

    def facts(self) -> dict[str, object]:
        """What report.json holds."""
        return {
            "passed": self.passed,
            "accuracy": round(self.accuracy, 4),
            "accuracy_wanted": ENOUGH,
            "accuracy_at_start": round(self.start_accuracy, 4),
            "accuracy_by_digit": {digit: round(share, 4) for digit, share in self.accuracy_by_digit.items()},
            "digits": self.digits,
            "digits_known": self.digits_known,
            "own_data_only": {
                "epochs": self.epochs * len(self.rounds),
                "accuracy_mean": round(statistics.mean(self.alone), 4),
                "accuracy_best": round(max(self.alone), 4),
                "digits_known_at_most": max(len(device.alone_known) for device in self.devices),
            },
            "images_held_out": self.images,
            "rounds_planned": self.rounds_planned,
            "seconds": {
                "round_first": round(self.rounds[0].seconds, 3),
                "round_median": round(statistics.median(self.seconds), 3),
                "round_min": round(min(self.seconds), 3),
                "round_max": round(max(self.seconds), 3),
                "setup": round(self.setup_seconds, 1),
                "training": round(self.training_seconds, 1),
                "total": round(self.total_seconds, 1),
            },
            "bytes_up": sum(device.bytes_up for device in self.devices),
            "bytes_down": sum(device.bytes_down for device in self.devices),
            "killed": [
                {"device": device.name, "round": device.killed_in, "back_after": device.back_after}
                for device in self.devices
                if device.killed_in is not None
            ],
            "memory": {
                "agent_median": _median([device.agent_memory for device in self.devices]),
                "agent_max": max(device.agent_memory for device in self.devices),
                "trainer_median": _median([device.trainer_memory for device in self.devices]),
                "trainer_max": max(device.trainer_memory for device in self.devices),
                "aggregator": self.aggregator_memory,
            },
            "rounds": [_rounded(one) for one in self.rounds],
            "devices": [asdict(device) for device in self.devices],
            "places": self.places,
            "notes": NOTES,
        }

    def write(self, path: Path) -> None:
        """Leave report.json."""
        path.write_text(json.dumps(self.facts(), indent=2) + "\n")

    def lines(self) -> list[str]:
        """The summary."""
        count, epochs = len(self.devices), self.epochs * len(self.rounds)
        up, down = sum(d.bytes_up for d in self.devices), sum(d.bytes_down for d in self.devices)
        agents, trainers = ([d.agent_memory for d in self.devices], [d.trainer_memory for d in self.devices])
        best = max(self.alone)
        return [
            f"{count} devices trained one model together in {len(self.rounds)} rounds; their data never left them.",
            "",
            f"No device alone can know more than {KNOWN} digits; the model that they trained together knows "
            f"{len(self.digits_known)} of {self.digits}.",
            *_entry("accuracy", f"{dot(self.accuracy)} on all {self.images} held-out images of all devices together"),
            *_entry(
                "of each digit", ", ".join(f"{digit} {dot(share)}" for digit, share in self.accuracy_by_digit.items())
            ),
            *_entry("of each release", _curve([self.start_accuracy, *(one.accuracy for one in self.rounds)])),
            *_entry(
                "own data only",
                f"{dot(statistics.mean(self.alone))} (best device {dot(best)}) after as many passes: {epochs} epochs",
            ),
            *_entry(
                "rounds",
                f"{len(self.rounds)}; {statistics.median(self.seconds):.2f} s each (median; {min(self.seconds):.2f} to "
                f"{max(self.seconds):.2f}), the first {self.rounds[0].seconds:.1f} s as {count} trainers had to start",
            ),
            *(line for device in self.devices if device.killed_in is not None for line in _killed(device)),
            *_entry(
                "bytes",
                f"up {size(up)}, down {size(down)}; a device: up {size(up / count)}, down {size(down / count)} "
                "(on the wire, TLS included)",
            ),
            *_entry(
                "memory",
                f"agent {size(_median(agents))} (largest {size(max(agents))}), trainer {size(_median(trainers))} "
                f"(largest {size(max(trainers))}), aggregator {size(self.aggregator_memory)}; resident",
            ),
            *_entry(
                "time",
                f"{self.total_seconds:.0f} s: set-up {self.setup_seconds:.0f}, training {self.training_seconds:.0f}",
            ),
            *(line for name, place in self.places.items() for line in _entry(name, place)),
            "",
            *(line for note in NOTES for line in _entry("note", note)),
        ]


NOTES = [
    "the agents read a /sys and a /proc of the demo's own making (on mains, nothing else to do): this many "
    "trainers on one machine would otherwise see each other as load, and rightly wait.",
    "they offer themselves after 1 second without obstacles instead of 60.",
    "the fleet's keys have no passphrase; a real fleet's have one.",
]


def dot(share: float) -> str:
    """0.8737 as .874."""
    return f"{share:.3f}".removeprefix("0")


def size(count: float) -> str:
    """Bytes for a person."""
    if count >= 1e6:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e3:.0f} kB"


def _curve(values: Sequence[float]) -> str:
    return " ".join(map(dot, values))


def _entry(name: str, text: str) -> list[str]:
    """A name, and its text in lines of at most 100 characters."""
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) > 100:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return [f"  {name if n == 0 else '':<16} {line}" for n, line in enumerate(lines)]


def _killed(device: DeviceRecord) -> list[str]:
    back = "did not come back" if device.back_after is None else f"was back after {device.back_after:.1f} s"
    return _entry(
        "killed",
        f"{device.name} in the middle of round {device.killed_in} (kill -9); it {back}, and {device.updates} of its "
        "updates count in all",
    )


def _median(values: Sequence[int]) -> int:
    return int(statistics.median(values))


def _rounded(record: RoundRecord) -> dict[str, object]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(record).items()}
