"""Scores: the mean return over fixed seeds in the official game, with its uncertainty."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap
from tqdm import tqdm

from wm import WMError
from wm.config import added, bounded, one_line
from wm.envs import ElsewhereConfig, EnvConfig, held_out_seeds
from wm.files import write_atomically
from wm.ranks import leads, shares
from wm.workers import Outcome, Player, Workers
from wm.worlds import ORDINARY, World

CONFIDENCE = 0.95
RESAMPLES = 10_000
SHARES = ".share-*.csv"  # of ranks, until all is played
EPISODES, DREAMS = "episodes.csv", "dreams.csv"  # the outcomes that scores are of


@dataclass(frozen=True)
class EvaluateConfig:
    episodes: int = bounded(100, 2)  # one for each of as many held-out seeds
    world: World = added(ORDINARY)  # of take-cover: it may differ from that of training
    reconstructed: int = added(0, 0)  # held-out episodes on whose frames V's error is measured

    def game(self, env: EnvConfig) -> EnvConfig:
        """A game in the world where it is scored."""
        return ElsewhereConfig(**vars(env), world=self.world)


@dataclass(frozen=True)
class Score:
    """Mean and standard deviation over episodes; the interval is of the mean (95 %, bootstrap)."""

    mean: float
    std: float
    ci_low: float
    ci_high: float


PARTS = tuple(part.name for part in fields(Score))  # as facts and tables name them


def score(returns: Sequence[float]) -> Score:
    """The score of episode returns; the percentile bootstrap is seeded, so it is repeatable."""
    values = np.asarray(returns, dtype=float)
    mean, std = float(values.mean()), float(values.std(ddof=1))
    if std == 0.0:
        return Score(mean, std, mean, mean)
    interval = bootstrap(
        (values,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Score(mean, std, float(interval.low), float(interval.high))


def score_of_seeds(returns: Sequence[Sequence[float]]) -> Score:
    """The score of several trainings [S,E]: their mean, and the deviation over all episodes.

    All trainings have played the same E held-out games, in the same order. So a resample draws S
    trainings, and E games that all of them play (the pigeonhole bootstrap, Owen 2007): what is
    easy in a game is easy for every training, and does not average out. Of dreams, which trainings
    do not share, it is a little too wide; for few seeds too narrow, as that of any percentile
    bootstrap: three drawn from three vary by two thirds of their true variance.
    """
    values = np.asarray(returns, dtype=float)
    generator = np.random.default_rng(0)
    drawn = [generator.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n for n in values.shape]
    means = np.einsum("rs,se,re->r", drawn[0], values, drawn[1], optimize=True)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    mean, std = float(values.mean()), float(values.std(ddof=1))
    return Score(mean, std, float(low), float(high))


def play_held_out(
    env: EnvConfig, player: Player, episodes: int, workers: Workers, name: str, table: Path
) -> list[Outcome]:
    """One episode per held-out seed, in the official game, drawn by the official code."""
    official = replace(env, fast_drawing=False)
    return play_seeds(official, player, held_out_seeds(episodes), workers, name, table)


def play_seeds(
    env: EnvConfig, player: Player, seeds: Sequence[int], workers: Workers, name: str, table: Path
) -> list[Outcome]:
    """One episode per seed, in the order of the seeds, and in the table; what is recorded stays.

    A rank that does not lead leaves the outcomes of its share beside the table, and gets no others
    but where the table is there.
    """
    played: list[Outcome] = []
    for kept, share in shares(table.parent, seeds):
        path, known = table.parent / f"{kept}.csv", _played_so_far(table.parent)
        if table.exists():  # then the leader may be about to remove the shares
            return read_outcomes(table)
        done = [known[seed] for seed in share if seed in known]
        left = workers.play(env, player, [seed for seed in share if seed not in known])
        bar = tqdm(left, name, len(share), initial=len(done), unit="episode", disable=not leads())
        for outcome in bar:
            done.append(outcome)
            write_outcomes(path, done)
        played += done
    played.sort(key=lambda outcome: outcome.seed)
    if leads():
        write_outcomes(table, played)
        for path in table.parent.glob(SHARES):
            path.unlink()
    return played


def _played_so_far(folder: Path) -> dict[int, Outcome]:
    """What any number of ranks has left here, by seed; the leader removes it when all is played."""
    known = {}
    for path in folder.glob(SHARES):
        try:
            known |= {outcome.seed: outcome for outcome in read_outcomes(path)}
        except WMError:
            if path.exists():
                raise
    return known


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
    """The returns of a table of episodes."""
    return [outcome.episode_return for outcome in read_outcomes(path)]


def read_outcomes(path: Path) -> list[Outcome]:
    """A table of episodes.

    Raises:
        WMError: if it is none.
    """
    try:
        with open(path, newline="") as file:
            return [
                Outcome(
                    int(row["seed"]),
                    float(row["return"]),
                    int(row["steps"]),
                    row["terminated"] == "1",
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise WMError(
            f"{path} is no table of episodes ({one_line(error)}); delete it and rerun"
        ) from error
