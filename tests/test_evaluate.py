"""Scores: the numbers, their uncertainty, and that every held-out seed is played once."""

import warnings

import numpy as np
import pytest

from wm.envs import EnvConfig, held_out_seeds
from wm.evaluate import play_held_out, read_returns, score, score_of_seeds, write_outcomes
from wm.workers import RandomPlayer, play

TINY = EnvConfig("tiny", max_steps=40)


def test_mean_and_standard_deviation_are_numpys():
    returns = np.random.default_rng(0).exponential(300, size=40)
    result = score(returns.tolist())
    assert result.mean == pytest.approx(returns.mean())
    assert result.std == pytest.approx(returns.std(ddof=1))
    assert result.ci_low < result.mean < result.ci_high
    assert score(returns.tolist()) == result  # repeatable, though a bootstrap


def test_the_interval_covers_the_true_mean_in_about_95_percent_of_repetitions():
    generator, truth = np.random.default_rng(1), 5.0
    draws = [score(generator.normal(truth, 2.0, size=50)) for _ in range(200)]
    covered = np.mean([draw.ci_low <= truth <= draw.ci_high for draw in draws])
    assert 0.90 <= covered <= 0.99


def test_the_interval_shrinks_with_the_root_of_the_number_of_episodes():
    returns = np.random.default_rng(2).normal(size=1600)
    few, many = score(returns[:100]), score(returns)
    ratio = (few.ci_high - few.ci_low) / (many.ci_high - many.ci_low)
    assert ratio == pytest.approx(4.0, rel=0.25)


@pytest.mark.parametrize("value", [0.0, 0.1, 2100.0])
@pytest.mark.parametrize("count", [2, 3])
def test_constant_returns_have_an_interval_of_no_width(value, count):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # SciPy warns of a degenerate distribution
        result = score([value] * count)
    assert (result.mean, result.ci_low, result.ci_high) == pytest.approx((value,) * 3)
    assert result.std == pytest.approx(0.0, abs=1e-12)


def width(result):
    return result.ci_high - result.ci_low


def test_the_interval_of_one_training_seed_is_that_of_its_episodes():
    returns = np.random.default_rng(3).exponential(300, size=100)
    one, both_levels = score(returns), score_of_seeds([returns])
    assert (both_levels.mean, both_levels.std) == pytest.approx((one.mean, one.std))
    assert both_levels.ci_low == pytest.approx(one.ci_low, abs=0.05 * width(one))
    assert both_levels.ci_high == pytest.approx(one.ci_high, abs=0.05 * width(one))
    assert score_of_seeds([returns]) == both_levels  # repeatable


def test_where_episodes_do_not_differ_the_interval_is_that_of_the_seeds():
    means = np.random.default_rng(4).normal(size=12)
    seeds, both_levels = score(means), score_of_seeds(means[:, None].repeat(20, axis=1))
    assert both_levels.mean == pytest.approx(means.mean())
    assert both_levels.ci_low == pytest.approx(seeds.ci_low, abs=0.05 * width(seeds))
    assert both_levels.ci_high == pytest.approx(seeds.ci_high, abs=0.05 * width(seeds))


def test_the_variances_of_both_levels_add_up():
    generator = np.random.default_rng(5)
    seeds, games = generator.normal(0, 1, (40, 1)), generator.normal(0, 2, 50)
    returns = seeds + games
    expected = 2 * 1.96 * np.sqrt(seeds.var() / 40 + games.var() / 50)
    assert width(score_of_seeds(returns)) == pytest.approx(expected, rel=0.05)


def test_what_all_trainings_share_does_not_average_out_between_them():
    returns = np.random.default_rng(6).exponential(300, size=100)
    thrice, once = score_of_seeds([returns] * 3), score(returns)
    assert width(thrice) == pytest.approx(width(once), rel=0.05)


def held_out(workers, table):
    return play_held_out(TINY, RandomPlayer("uniform"), 7, workers, "random", table)


def test_every_held_out_seed_is_played_exactly_once_and_kept(workers, tmp_path):
    path = tmp_path / "episodes.csv"
    outcomes = held_out(workers, path)
    assert [outcome.seed for outcome in outcomes] == list(held_out_seeds(7))
    assert outcomes == play(TINY, RandomPlayer("uniform"), held_out_seeds(7))
    assert read_returns(path) == [outcome.episode_return for outcome in outcomes]
    lines = path.read_text().splitlines()
    assert lines[0] == "seed,return,steps,terminated"
    seeds, _, steps, _ = zip(*(line.split(",") for line in lines[1:]), strict=True)
    assert [*map(int, seeds)] == [*held_out_seeds(7)]
    assert [*map(int, steps)] == [outcome.steps for outcome in outcomes]


class Counter:
    """Workers that play one after the other and count, and are stopped after so many."""

    def __init__(self, most):
        self.played, self.most = 0, most

    def play(self, env, player, seeds):
        for outcome in play(env, player, seeds):
            if self.played == self.most:
                raise KeyboardInterrupt
            self.played += 1
            yield outcome


def test_an_interrupted_evaluation_plays_nothing_twice(tmp_path):
    table, first, second = tmp_path / "episodes.csv", Counter(4), Counter(7)
    with pytest.raises(KeyboardInterrupt):
        held_out(first, table)
    assert not table.exists()
    outcomes = held_out(second, table)
    assert outcomes == play(TINY, RandomPlayer("uniform"), held_out_seeds(7))
    assert (first.played, second.played) == (4, 3)
    assert held_out(Counter(0), table) == outcomes
    assert [path.name for path in tmp_path.glob("*.csv")] == ["episodes.csv"]


def test_what_one_process_has_played_is_known_to_two(tmp_path, as_rank):
    table = tmp_path / "episodes.csv"
    with pytest.raises(KeyboardInterrupt):
        held_out(Counter(4), table)  # of seven
    as_rank(1, 2)
    assert len(held_out(Counter(1), table)) == 3
    as_rank(0, 2)
    assert held_out(Counter(2), table) == play(TINY, RandomPlayer("uniform"), held_out_seeds(7))
    assert [path.name for path in tmp_path.glob("*.csv")] == ["episodes.csv"]
    as_rank(1, 2)
    assert len(held_out(Counter(0), table)) == 7  # late: all is done


@pytest.mark.parametrize("lost", [False, True])
def test_the_leader_has_every_ranks_outcomes_and_plays_those_of_a_lost_one(
    lost, workers, tmp_path, as_rank
):
    others, table = play(TINY, RandomPlayer("uniform"), held_out_seeds(7)[1::2]), tmp_path / "e.csv"
    if not lost:
        as_rank(1, 2)
        assert held_out(workers, table) == others
        assert not table.exists()
    as_rank(0, 2)
    outcomes = held_out(workers, table)
    assert outcomes == play(TINY, RandomPlayer("uniform"), held_out_seeds(7))
    assert not list(tmp_path.glob(".*.csv"))


def test_scores_are_taken_in_the_official_game(tmp_path):
    class Spy:
        def play(self, env, player, seeds):
            self.env = env
            return iter([])

    spy = Spy()
    race = EnvConfig("carracing", crop=12)
    play_held_out(race, RandomPlayer("uniform"), 2, spy, "random", tmp_path / "e.csv")
    assert spy.env == EnvConfig("carracing", crop=12, fast_drawing=False)


def test_returns_survive_the_table_to_the_last_digit(tmp_path):
    outcomes = play(EnvConfig("carracing", max_steps=30), RandomPlayer("brownian"), [1, 2])
    write_outcomes(tmp_path / "episodes.csv", outcomes)
    returns = read_returns(tmp_path / "episodes.csv")
    assert returns == [outcome.episode_return for outcome in outcomes]
    assert any(value % 1 for value in returns)  # CarRacing's are no round numbers
