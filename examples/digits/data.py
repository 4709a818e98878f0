"""The digits of the demo, dealt out so that no device ever sees more than three of the ten.

They are the UCI handwritten digits that scikit-learn carries: 1,797 images of 8 x 8 pixels. Nothing is downloaded.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits

DIGITS = 10
KNOWN = 3
"""Digits that one device sees."""

Rows = npt.NDArray[np.intp]


def digits_of(device: int, devices: int) -> tuple[int, ...]:
    """The digits that a device holds: three in a row, the devices spread evenly over all ten."""
    first = DIGITS * device // devices
    return tuple((first + step) % DIGITS for step in range(KNOWN))


def deal(labels: npt.NDArray[np.int64], devices: int, seed: int = 0) -> list[Rows]:
    """For each device the rows that are its own: a digit's images are divided among its holders, none given twice."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    dealt: list[list[Rows]] = [[] for _ in range(devices)]
    for digit in range(DIGITS):
        holders = [device for device in range(devices) if digit in digits_of(device, devices)]
        rows = shuffled[labels[shuffled] == digit]
        for turn, device in enumerate(holders):
            dealt[device].append(rows[turn :: len(holders)])
    return [np.sort(np.concatenate(parts)) for parts in dealt]


def load() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """(x float32[n, 64], pixels from 0 to 1; y int64[n], digits from 0 to 9)."""
    pixels, labels = load_digits(return_X_y=True)
    return (pixels / 16).astype(np.float32), labels.astype(np.int64)


def write(path: Path, pixels: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> None:
    """One device's file, as the task's data contract wants it."""
    np.savez(path, x=pixels, y=labels)
