"""What the demo says at the end, and when it says that it failed."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from examples.digits.report import DeviceRecord, Report, RoundRecord, dot, size
from examples.digits.screen import HEIGHT, Picture, curve


def _round(number: int, accuracy: float, seconds: float = 0.5) -> RoundRecord:
    return RoundRecord(
        round=number,
        release=number,
        accuracy=accuracy,
        loss=1.0,
        reported_accuracy=None,
        seconds=seconds,
        at=10.0 + number,
        bytes_up=20_000,
        bytes_down=30_000,
    )


def _report(*accuracies: float) -> Report:
    device = DeviceRecord(
        name="device-0",
        digits=(0, 1, 2),
        bytes_up=2_000_000,
        bytes_down=1_500_000,
        agent_memory=45_000_000,
        trainer_memory=300_000_000,
        alone_accuracy=0.31,
        alone_known=(0, 1, 2),
    )
    return Report(
        rounds_planned=len(accuracies),
        epochs=3,
        images=380,
        digits=10,
        start_accuracy=0.08,
        rounds=[_round(n + 1, accuracy, 9.0 if n == 0 else 0.5) for n, accuracy in enumerate(accuracies)],
        devices=[device],
        digits_known=tuple(range(9)),
        accuracy_by_digit={0: 1.0, 1: 0.5},
        aggregator_memory=80_000_000,
        setup_seconds=5.0,
        training_seconds=15.0,
        total_seconds=22.0,
        places={"model": "/somewhere/digits.safetensors"},
    )


@pytest.mark.parametrize(("last", "passed"), [(0.6999, False), (0.70, True), (0.9, True)])
def test_the_last_release_decides(last: float, passed: bool) -> None:
    """Below .70 the demo has failed, however good an earlier release was."""
    assert _report(0.95, last).passed is passed


def test_report_and_summary_hold_the_same_figures(tmp_path: Path) -> None:
    """report.json is JSON with one record a round, and every figure of it that people want is in the summary."""
    report = _report(0.3, 0.6, 0.8737)
    report.write(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert [one["round"] for one in found["rounds"]] == [1, 2, 3]
    assert (found["accuracy"], found["passed"], found["digits_known"]) == (0.8737, True, list(range(9)))
    assert found["own_data_only"] == {
        "epochs": 9,
        "accuracy_mean": 0.31,
        "accuracy_best": 0.31,
        "digits_known_at_most": 3,
    }
    assert found["seconds"]["round_median"] == 0.5
    text = "\n".join(report.lines())
    for part in (".080 .300 .600 .874", ".310", "knows 9 of 10", "9 epochs", "the first 9.0 s", "0.50 s each"):
        assert part in text
    for part in ("up 2.0 MB", "down 1.5 MB", "45.0 MB", "300.0 MB", "80.0 MB", "22 s", "digits.safetensors", "/proc"):
        assert part in text


def test_one_round_is_a_report_too() -> None:
    """The spread of a single round is that round."""
    assert any("9.00 to 9.00" in line for line in _report(0.5).lines())


def test_figures_read_well() -> None:
    """Shares have three digits, sizes a unit."""
    assert (dot(0.8737), dot(0.0), dot(1.0)) == (".874", ".000", "1.000")
    assert (size(812), size(20_400), size(2_500_000)) == ("1 kB", "20 kB", "2.5 MB")


def test_bars_are_as_high_as_the_accuracy() -> None:
    """0 is an empty column, 1 a full one, a half fills half of the lines; the axis gives the seconds."""
    lines = [line.plain for line in curve([_round(1, 0.0), _round(2, 0.5), _round(3, 1.0)], 3)]
    bars = lines[1:-1]
    assert len(bars) == HEIGHT
    columns = [[line[9 + 5 * n] for line in bars] for n in range(3)]
    assert [column.count("█") for column in columns] == [0, HEIGHT // 2, HEIGHT]
    assert lines[-1].split() == ["sec.", "11.0", "12.0", "13.0"]


def test_picture_shows_stage_curve_and_devices() -> None:
    """What the live picture is told, it shows."""
    console = Console(file=io.StringIO(), width=110, force_terminal=True, color_system=None)
    picture = Picture(console, 15)
    picture.stage("training for 15 rounds")
    picture.devices(_report(0.5).devices)
    picture.released(_round(4, 0.74))
    with console.capture() as shown:
        console.print(picture.draw())
    for part in ("training for 15 rounds", "round 4/15", ".740", "device-0", "0 1 2", "2.0 MB"):
        assert part in shown.get()
