"""Scores: the mean return over fixed seeds in the official game, with its uncertainty."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap
from tqdm import tqdm

from wm.config import bounded
from wm.envs import EnvConfig, held_out_seeds
from wm.files import write_atomically
from wm.workers import Outcome, Player, Workers

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class EvaluateConfig:
    episodes: int = bounded(100, 2)  # one for each of as many held-out seeds


@dataclass(frozen=True)
class Score:
    """Mean and standard deviation over episodes; the interval is of the mean (95 %, bootstrap)."""

    mean: float
    std: float
    ci_low: float
    ci_high: float
    episodes: int


def score(returns: Sequence[float]) -> Score:
    """The score of episode returns; the percentile bootstrap is seeded, so it is repeatable."""
    values = np.asarray(returns, dtype=float)
    mean, std = float(values.mean()), float(values.std(ddof=1))
    if std == 0.0:
        return Score(mean, std, mean, mean, len(values))
    interval = bootstrap(
        (values,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Score(mean, std, float(interval.low), float(interval.high), len(values))


def play_held_out(
    env: EnvConfig, player: Player, episodes: int, workers: Workers, name: str
) -> list[Outcome]:
    """One episode per held-out seed, in the official game, drawn by the official code."""
    seeds, official = held_out_seeds(episodes), replace(env, fast_drawing=False)
    outcomes = tqdm(workers.play(official, player, seeds), name, len(seeds), unit="episode")
    return list(outcomes)


def write_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """A CSV with one line per episode."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["seed", "return", "steps", "terminated"])
    for outcome in outcomes:
        row = [outcome.seed, outcome.episode_return, outcome.steps, int(outcome.terminated)]
        table.writerow(row)
    write_atomically(path, text.getvalue())


def read_returns(path: Path) -> list[float]:
    with open(path, newline="") as file:
        return [float(row["return"]) for row in csv.DictReader(file)]
