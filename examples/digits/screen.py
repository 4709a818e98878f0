"""Shows a demo while it runs: a live picture on a terminal, plain lines elsewhere. It decides and measures nothing."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from examples.digits.report import DeviceRecord, RoundRecord, dot, size

HEIGHT = 8
"""Lines of the curve."""

WIDTH = 15
"""Rounds that it shows, the newest."""

_BLOCKS = " ▁▂▃▄▅▆▇█"


class Screen(Protocol):
    """Where a demo shows itself."""

    def stage(self, text: str) -> None:
        """What begins now."""

    def released(self, record: RoundRecord) -> None:
        """A round gave a release."""

    def devices(self, devices: Sequence[DeviceRecord]) -> None:
        """How the devices are; shown now or later."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_screen(rounds: int) -> Screen:
    """The one that suits standard output."""
    console = Console()
    return Picture(console, rounds) if console.is_terminal and not console.is_dumb_terminal else Lines(rounds)


class Lines:
    """One line for each stage and each round."""

    def __init__(self, rounds: int) -> None:
        self._rounds, self._begun = rounds, time.monotonic()
        self._devices: Sequence[DeviceRecord] = ()

    def stage(self, text: str) -> None:
        """A line."""
        self._say(text)

    def released(self, record: RoundRecord) -> None:
        """A line."""
        states = Counter(device.state for device in self._devices)
        self._say(
            f"round {record.round:>2}/{self._rounds}  accuracy {dot(record.accuracy)}  {record.seconds:.2f} s  "
            f"up {size(record.bytes_up)}  down {size(record.bytes_down)}  devices: "
            + ", ".join(f"{count} {state}" for state, count in states.most_common())
        )

    def devices(self, devices: Sequence[DeviceRecord]) -> None:
        """Kept for the next line."""
        self._devices = devices

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._begun:6.1f} s  {text}", flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stdout.flush()


class Picture:
    """Stage, accuracy over time and a table of the devices, drawn again as they change."""

    def __init__(self, console: Console, rounds: int) -> None:
        self._rounds, self._begun = rounds, time.monotonic()
        self._stage = ""
        self._records: list[RoundRecord] = []
        self._devices: Sequence[DeviceRecord] = ()
        self._live = Live(console=console, get_renderable=self.draw, refresh_per_second=4)

    def stage(self, text: str) -> None:
        """The first line."""
        self._stage = text

    def released(self, record: RoundRecord) -> None:
        """Another bar of the curve."""
        self._records.append(record)

    def devices(self, devices: Sequence[DeviceRecord]) -> None:
        """The table."""
        self._devices = devices

    def draw(self) -> RenderableType:
        """All of it as it is now."""
        head = Text.assemble((f"{time.monotonic() - self._begun:5.1f} s  ", "dim"), (self._stage, "bold"))
        parts: list[RenderableType] = [head]
        if self._records:
            parts += [Text(), *curve(self._records, self._rounds)]
        if self._devices:
            parts += [Text(), _table(self._devices)]
        return Group(*parts)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)


def curve(records: Sequence[RoundRecord], rounds: int) -> list[Text]:
    """Accuracy over time: a bar for each release, 0 to 1 in HEIGHT lines, with the seconds below."""
    newest = records[-1]
    shown = records[-WIDTH:]
    lines = [
        Text.assemble(
            f"round {newest.round}/{rounds}   accuracy ",
            (dot(newest.accuracy), "bold green"),
            f"   {newest.seconds:.2f} s   up {size(newest.bytes_up)}   down {size(newest.bytes_down)}",
        )
    ]
    for level in reversed(range(HEIGHT)):
        label = {HEIGHT - 1: "1.0", HEIGHT // 2 - 1: " .5", 0: " .0"}.get(level, "   ")
        fills = [min(8, max(0, round((one.accuracy * HEIGHT - level) * 8))) for one in shown]
        lines.append(Text(f"  {label} ┤ " + "".join(_BLOCKS[fill] * 4 + " " for fill in fills), style="green"))
    lines.append(Text("  sec.   " + "".join(f"{one.at:>4.{0 if one.at >= 99 else 1}f} " for one in shown), style="dim"))
    return lines


def _table(devices: Sequence[DeviceRecord]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in ("device", "digits", "state"):
        table.add_column(head)
    for head in ("round", "updates", "up", "down", "agent", "trainer"):
        table.add_column(head, justify="right")
    for device in devices:
        table.add_row(
            device.name,
            " ".join(map(str, device.digits)),
            device.state,
            str(device.round or "-"),
            str(device.updates),
            size(device.bytes_up),
            size(device.bytes_down),
            size(device.agent_memory),
            size(device.trainer_memory) if device.trainer_memory else "-",
        )
    return table
