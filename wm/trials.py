"""One trial of a grid, a cell with a training seed, and what several say together."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from wm.evaluate import DREAMS, EPISODES, Score, read_returns, score, score_of_seeds
from wm.grid import Cell
from wm.schedule import Pipeline
from wm.stages import Stage
from wm.tracking import Tracker, read_metrics

RETURNS = {  # metrics that are means over episodes, and the file in which their stage keeps these
    "random/mean": EPISODES,
    "eval/mean": EPISODES,
    "dream/mean": DREAMS,
}
LEAST_SEEDS = 3  # of an interval over training seeds alone, of a difference, of what is published


@dataclass(eq=False)
class Trial:
    """A cell with one training seed."""

    cell: Cell
    seed: int
    episodes: int  # of a score
    pipeline: Pipeline
    was_finished: bool = field(default=False, init=False)  # then nobody looks at its files again

    @property
    def name(self) -> str:
        return f"{self.cell.name}, seed {self.seed}"

    @property
    def command(self) -> str:
        return f"wm run {shlex.join(self.pipeline.words)}"

    @property
    def last(self) -> Stage:
        return self.pipeline.stages[-1]

    @property
    def fingerprint(self) -> str:
        """Of the pipeline and its place in the grid: two cells may come to the same."""
        return f"{self.name} {self.last.fingerprint}"

    @property
    def stages_done(self) -> int:
        return sum(stage.done for stage in self.pipeline.stages)

    @property
    def finished(self) -> bool:
        stages = reversed(self.pipeline.stages)
        self.was_finished = self.was_finished or all(stage.done for stage in stages)
        return self.was_finished

    def fact(self, metric: str) -> float | None:
        """The last value of a metric, of the newest stage that knows it."""
        for stage in reversed(self.pipeline.stages):
            record = stage.record
            if record and metric in record["facts"]:
                return record["facts"][metric]
            if values := read_metrics(stage.folder).get(metric):
                return values[max(values)]
        return None

    def returns(self, metric: str) -> list[float]:
        """The episodes whose mean a metric is."""
        return read_returns(self.table(metric))

    def table(self, metric: str) -> Path:
        """The file of these episodes."""
        for stage in reversed(self.pipeline.stages):  # the first has thousands of files
            record = stage.record
            if record and metric in record["facts"]:
                return stage.folder / RETURNS[metric]
        raise KeyError(metric)

    def metrics(self, names: Sequence[str]) -> dict[str, float]:
        """Of this trial alone; with means over episodes their deviation and interval."""
        around = ("std", "ci_low", "ci_high")
        means = [name.removesuffix("mean") for name in names if name in RETURNS]
        wanted = [*names, *(mean + part for mean in means for part in around)]
        facts = {name: self.fact(name) for name in wanted}
        return {name: value for name, value in facts.items() if value is not None}

    def line(self, names: Sequence[str]) -> str:
        facts = ((name, self.fact(name)) for name in names)
        known = [f"{name} {value:.4g}" for name, value in facts if value is not None]
        return f"{self.name}: {', '.join(known)}"

    def track(self, tracker: Tracker, names: Sequence[str]) -> None:
        """Its run below the grid's: every axis and the seed as parameters."""
        set_here = {**self.cell.values, "seed": self.seed}
        metrics = self.metrics(names)
        tracker.cell(self.name, self.fingerprint, set_here, metrics, self.finished)


def together(trials: Sequence[Trial], metric: str) -> Score | None:
    """The score of a cell's finished trials; None if none knows the metric.

    Means over episodes have the deviation over episodes and an interval of both levels. Other
    metrics have one value a seed: deviation and interval are over seeds, NaN for less than three.
    """
    known = [(trial, trial.fact(metric)) for trial in trials if trial.finished]
    known = [(trial, value) for trial, value in known if value is not None]
    if not known:
        return None
    if metric in RETURNS:
        returns = {trial.table(metric): trial.returns(metric) for trial, _ in known}
        return score_of_seeds([*returns.values()])  # once of what does not depend on the seed
    values = [value for _, value in known]
    if len(values) < LEAST_SEEDS:
        return Score(float(np.mean(values)), math.nan, math.nan, math.nan)
    return score(values)


def returns_by_seed(trials: Sequence[Trial], metric: str) -> dict[int, list[float]]:
    """The episodes of a cell's finished trials that know a mean over episodes."""
    known = [t for t in trials if t.finished and t.fact(metric) is not None]
    return {trial.seed: trial.returns(metric) for trial in known}


def difference(one: dict[int, list[float]], other: dict[int, list[float]]) -> Score | None:
    """How much more the other cell's episodes return, each than that of the same seed and game.

    None if the two, returns by training seed, have less than LEAST_SEEDS in common: trainings
    differ more than chance in their games says. Of the games those count that all have played: the
    first, as held-out seeds are one range.
    """
    seeds = sorted(one.keys() & other.keys())
    if len(seeds) < LEAST_SEEDS:
        return None
    games = min(len(returns[seed]) for returns in (one, other) for seed in seeds)
    ours, theirs = (np.array([returns[seed][:games] for seed in seeds]) for returns in (one, other))
    return score_of_seeds(theirs - ours)
