"""A player who brings real trouble: in a module that processes who play can load by its name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from wm.workers import RandomPlayer


@dataclass(frozen=True)
class Saboteur:
    """A random player who does harm at its first `times` attempts."""

    harm: Callable[[], None]  # done in the process that plays, whose game has started
    diary: Path  # a stroke for every attempt
    times: int = 1

    def __call__(self, games):
        with open(self.diary, "a") as file:
            file.write("|")
        if self.attempts <= self.times:
            self.harm()
        return RandomPlayer("uniform")(games)

    @property
    def attempts(self):
        return len(self.diary.read_text())
