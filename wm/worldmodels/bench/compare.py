"""Two rates measured in turn, and how they compare.

Both sides of a comparison are timed A B A B, because machines are shared and noisy: what counts is
the median of their ratios and its spread, not one absolute time.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

PAIRS = 3

Rate = Callable[[], float]  # one measurement, in units a second


@dataclass(frozen=True)
class Comparison:
    """Rates of ours and theirs, measured in turn."""

    name: str
    against: str
    unit: str
    ours: list[float]
    theirs: list[float]
    target: float | None = None  # of the ratio

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    def __str__(self) -> str:
        rates = f"{median(self.ours):12,.1f}{median(self.theirs):12,.1f} {self.unit}/s"
        ratio = f"{median(self.ratios):7.2f} [{min(self.ratios):.2f}, {max(self.ratios):.2f}]"
        target = f"target {self.target:g}" if self.target else ""
        return f"{self.name:32}{self.against:34}{rates:34}{ratio:24}{target}"


def compare(
    name: str, against: str, unit: str, ours: Rate, theirs: Rate, target: float | None = None
) -> Comparison:
    """Measure two rates in turn, PAIRS times."""
    pairs = [(ours(), theirs()) for _ in range(PAIRS)]
    result = Comparison(name, against, unit, *map(list, zip(*pairs, strict=True)), target)
    print(result, flush=True)
    return result


def seconds(work: Callable[[], Any]) -> float:
    """How long work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def timed(units: float, work: Callable[[], Any]) -> float:
    """The rate of work that does so many units."""
    return units / seconds(work)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing is printed inside."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
