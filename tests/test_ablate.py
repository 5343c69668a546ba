"""A grid from its words to its table: shared stages, failures, interruptions, MLflow, files.

The games are left out: stages here write made-up scores, in forked processes.
"""

import csv
import multiprocessing
import os
import shutil
import signal
from contextlib import nullcontext
from functools import partial
from math import nan
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
from mlflow import MlflowClient

from wm import WMError, results, schedule
from wm.ablate import ablate, time_left
from wm.config import ConfigError, load
from wm.evaluate import Score, score_of_seeds
from wm.grid import Grid, cells
from wm.schedule import Pipeline
from wm.stages import Stage, run_stage
from wm.trials import Trial, together
from wm.worldmodels.pipeline import Config

GRID = """# Question: which is best?
# Published: the second.
base: {env: tiny}
axes:
  vision.beta: [0.1, 1]
  controller.temperature: [0.5, 1.0]
seeds: [0, 1, 2]
metrics: [vision/val_kl, eval/mean]
published:
  - {at: {vision.beta: 1, controller.temperature: 0.5}, eval/mean: 20 ± 3}
  - {by: them, at: {vision.beta: 7}, eval/mean: 1 ± 1}
pictures: vision/seen.png
at: {smoke: {base: {memory.mixtures: 4}}}
"""
METRICS = ["eval/mean", "dream/mean", "random/mean"]
CELLS = [(beta, tau) for beta in ("0.1", "1") for tau in ("0.5", "1.0")]


class NoTracker:
    """For the stages, which are not what is tested."""

    versions = {"commit": "c0ffee"}

    def stage(self, stage):
        nothing = SimpleNamespace(busy_seconds=0.0, run_id="", log_metrics=lambda facts: None)
        return nullcontext(nothing)


def see(folder, inputs, run, config):
    begin("vision", config)
    iio.imwrite(folder / "seen.png", np.zeros((9, 9, 3), np.uint8))
    return {"vision/val_kl": config.vision.beta + config.seed}


def judge(folder, inputs, run, config):
    begin("evaluate", config)
    tau, returns = config.controller.temperature, [10.0 * config.seed, 30.0 * config.seed]
    if tau == 1 and os.path.exists("broken"):
        raise RuntimeError("no game is left")
    if tau == 1 and os.path.exists("interrupt"):
        os.unlink("interrupt")
        os.kill(os.getppid(), signal.SIGINT)
    lines = [f"{seed},{value},1,1\n" for seed, value in enumerate(returns)]
    (folder / "episodes.csv").write_text("seed,return,steps,terminated\n" + "".join(lines))
    return {"eval/mean": 20.0 * config.seed, "eval/std": 14.1}


def begin(name, config):
    with open("begun", "a") as file:
        file.write(f"{name} {config.seed} {config.trainer.workers}\n")


def begun(name):
    with open("begun") as file:
        return sum(line.startswith(name) for line in file)


def stages(config):
    root = Path(config.runs) / config.env.name
    given = {"seed": config.seed, "beta": config.vision.beta}
    vision = Stage("vision", 1, given, partial(see, config=config), root)
    tau = {"temperature": config.controller.temperature}
    work = partial(judge, config=config)
    return [vision, Stage("evaluate", 1, tau, work, root, {"vision": vision})]


def run_labelled(label, words):
    stage = next(stage for stage in stages(load(Config, words)) if stage.label == label)
    run_stage(stage, NoTracker())


FAMILY = SimpleNamespace(Config=Config, stages=stages, run_labelled=run_labelled)


@pytest.fixture(autouse=True)
def quick_processes(monkeypatch):
    monkeypatch.setattr(schedule, "CONTEXT", multiprocessing.get_context("fork"))


@pytest.fixture
def grid(own_folder, runs, request):
    """grid(words): `wm ablate` of a grid whose name is the test's own; the folder it fills."""
    name = request.node.name.replace("_", "-")
    (own_folder / f"{name}.yaml").write_text(GRID)
    shutil.rmtree(runs / "tiny", ignore_errors=True)  # of other tests: the database is shared

    def run(*words):
        ablate(FAMILY, [f"{name}.yaml", "scale=smoke", f"runs={runs}", *words])
        return runs / "ablations" / f"{name}-smoke"

    run.name = name
    return run


def mlflow_runs(runs, name):
    """The parents of a grid's experiment, and their children by name."""
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    experiment = client.get_experiment_by_name(f"ablation-{name}")
    found = client.search_runs([experiment.experiment_id])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = {run.info.run_name: run for run in found if run not in parents}
    assert len(children) == len(found) - len(parents)  # no doubles
    return client, parents, children


def test_a_grid_shares_stages_and_ends_in_a_table_a_figure_and_runs(grid, runs):
    folder = grid("jobs=2")
    assert begun("vision") == 6 and begun("evaluate") == 12  # 2 betas, 2 temperatures, 3 seeds
    with open(folder / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["vision.beta"], row["controller.temperature"]) for row in rows] == CELLS
    for row in rows:
        assert (row["seeds"], row["episodes"]) == ("3", "2")
        assert float(row["eval/mean mean"]) == 20
        assert float(row["eval/mean ci_low"]) < 20 < float(row["eval/mean ci_high"])
        assert float(row["vision/val_kl mean"]) == pytest.approx(float(row["vision.beta"]) + 1)
    assert [row["eval/mean published"] for row in rows] == ["", "", "20 ± 3", ""]

    page = (folder / "table.md").read_text()
    for part in ("which is best?", "the second.", "Training seeds: 3 (0, 1, 2), 2 episodes each"):
        assert part in page
    assert "Told apart by eval/mean: 0 of 6 pairs" in page
    assert "| 1 | 0.5 | 2.000 ± 1.000 [1.000, 3.000] | 20.0 ± " in page
    assert "] | 20 ± 3 | 3 |" in page and "vision.beta 7, by them, eval/mean 1 ± 1" in page
    assert "In every cell: `env=tiny memory.mixtures=4`." in page
    assert f"wm ablate {grid.name}.yaml scale=smoke" in page and "stages made at c0ffee" in page
    assert "Its 18 stages took 0 minutes, added up." in page
    assert iio.imread(folder / "figure.png").size and iio.imread(folder / "pictures.png").size

    client, (parent,), children = mlflow_runs(runs, grid.name)
    shown = parent.data.params
    assert parent.info.status == "FINISHED" and shown["env.name"] == "tiny"
    assert shown["memory.mixtures"] == "4"  # of the base at this scale
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert artifacts == {"config.yaml", "table.csv", "table.md", "figure.png", "pictures.png"}
    assert len(children) == 12
    child = children["beta 1, temperature 0.5, seed 2"]
    shown = {"vision.beta": "1", "controller.temperature": "0.5", "seed": "2"}
    assert child.data.params == shown
    expected = {"eval/mean": 40.0, "eval/std": 14.1, "vision/val_kl": 3.0}
    assert child.data.metrics == pytest.approx(expected)


def test_a_trial_is_finished_when_all_its_stages_are():
    lost, report = SimpleNamespace(done=False), SimpleNamespace(done=True)
    cell, *_ = cells(Grid(axes={"rounds": [1]}))
    assert not Trial(cell, 0, 2, Pipeline((), (lost, report))).finished
    assert Trial(cell, 0, 2, Pipeline((), (report, report))).finished


def test_what_does_not_depend_on_the_seed_counts_once(tmp_path):
    (tmp_path / "episodes.csv").write_text("seed,return,steps,terminated\n1,2,3,1\n2,4,3,1\n")
    random = SimpleNamespace(
        done=True, folder=tmp_path, record={"facts": {"random/mean": 3.0}}, fingerprint="f"
    )
    cell, *_ = cells(Grid(axes={"rounds": [1]}))
    trials = [Trial(cell, seed, 2, Pipeline((), (random,))) for seed in range(3)]
    assert together(trials, "random/mean") == score_of_seeds([[2.0, 4.0]])


def test_a_failed_cell_is_named_and_the_others_finish(grid, runs, own_folder, capsys):
    (own_folder / "broken").touch()
    with pytest.raises(WMError, match="2 stages failed"):
        grid("jobs=1", "seeds=[1]")
    output = capsys.readouterr().out
    assert "RuntimeError: no game is left" in output  # the last lines of its log
    assert "**Not finished:** beta 1, temperature 1.0, seed 1" in output
    assert "| 1 | 1.0 | - | - | - | 0 of 1 |" in output
    assert "| 1 | 0.5 | 2.000 | 20.0 ± " in output
    _, (parent,), children = mlflow_runs(runs, grid.name)
    ended = {name: child.info.status for name, child in children.items()}
    assert ended["beta 1, temperature 1.0, seed 1"] == parent.info.status == "FAILED"
    assert ended["beta 1, temperature 0.5, seed 1"] == "FINISHED"

    (own_folder / "broken").unlink()
    grid("jobs=1", "seeds=[1]")  # the same parent and children
    _, (again,), children = mlflow_runs(runs, grid.name)
    assert again.info.run_id == parent.info.run_id
    assert {child.info.status for child in children.values()} == {again.info.status} == {"FINISHED"}
    assert begun("vision") == 2 and begun("evaluate") == 6  # two of them twice


def test_what_words_ask_for_leaves_the_results_of_the_file_alone(grid, runs):
    grid("jobs=1", "seeds=[1]", "vision.latent=4")
    names = [path.name for path in (runs / "ablations").glob(f"{grid.name}-smoke*")]
    assert len(names) == 1 and names[0] != f"{grid.name}-smoke"


def test_a_word_chooses_a_point_that_the_scale_leaves_out(grid, own_folder, capsys):
    small = "{base: {memory.mixtures: 4}, axes: {vision.beta: [0.1, 3]}}"
    text = GRID.replace("{base: {memory.mixtures: 4}}", small)
    (own_folder / f"{grid.name}.yaml").write_text(text)
    grid("--dry-run", "seeds=[0]", "vision.beta=1")
    output = capsys.readouterr().out
    assert "beta 1, temperature 1.0, seed 0" in output and "beta 0.1" not in output
    grid("--dry-run", "seeds=[0]", "vision.beta=3")  # which only the scale has
    assert "beta 3, temperature 1.0, seed 0" in capsys.readouterr().out


def test_a_metric_that_nothing_has_measured_is_named(grid, own_folder, capsys):
    file = own_folder / f"{grid.name}.yaml"
    file.write_text(GRID.replace("eval/mean]", "eval/maen]"))
    grid("jobs=1", "seeds=[1]")
    assert f"no stage has measured eval/maen; see the metrics in {file.name}" in (
        capsys.readouterr().out
    )


def test_an_interrupted_grid_goes_on_where_it_was(grid, runs, own_folder):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    (own_folder / "interrupt").touch()
    with pytest.raises(KeyboardInterrupt):
        grid("jobs=1", "seeds=[0]")
    _, (parent,), _ = mlflow_runs(runs, grid.name)
    assert parent.info.status == "KILLED"
    grid("jobs=1", "seeds=[0]")
    assert begun("vision") == 2 and begun("evaluate") in (4, 5)  # at most one was cut
    assert mlflow_runs(runs, grid.name)[1][0].info.status == "FINISHED"


def test_a_dry_run_says_what_is_done_and_does_nothing(grid, runs, capsys):
    folder = grid("--dry-run", "jobs=2")
    output = capsys.readouterr().out
    assert "0 of 2 stages done  beta 1, temperature 0.5, seed 2" in output
    assert "18 distinct stages to do" in output and "about 11 min left" in output  # START included
    grid("--dry-run", "jobs=1")  # one after another, on both cores that the minutes mean
    assert "about 12 min left" in capsys.readouterr().out
    assert not folder.exists() and not (runs / "tiny").exists()


def test_stages_of_unknown_time_are_not_passed_over():
    free = SimpleNamespace(inputs={})
    tasks = [SimpleNamespace(seconds=seconds, stage=free) for seconds in (60, 0, 60)]
    said = [time_left(dict(enumerate(some)), 2) for some in (tasks, tasks[::2], tasks[1:2], [])]
    nobody = "nobody knows how long it takes"
    assert said == ["at least 1 min left", "about 1 min left", nobody, "about 0 min left"]


def test_stages_that_need_one_another_are_not_done_side_by_side():
    made = []
    for number, needed in enumerate([[], [0], [], [1, 2]]):
        inputs = {str(n): made[n].stage for n in needed}
        stage = SimpleNamespace(fingerprint=number, inputs=inputs)
        made.append(SimpleNamespace(seconds=60, stage=stage))
    assert time_left(dict(enumerate(made)), 2) == "about 3 min left"  # 0, 1 and 3
    assert time_left(dict(enumerate(made)), 1) == "about 4 min left"
    assert time_left({1: made[1], 3: made[3]}, 8) == "about 2 min left"


def test_what_is_published_is_copied_beside_the_grid(grid, own_folder):
    with pytest.raises(ConfigError, match="3 training seeds at least"):
        grid("publish=true", "seeds=[0,1]")
    grid("publish=true", "jobs=1")
    names = {path.name for path in (own_folder / grid.name).iterdir()}
    assert names == {"table.csv", "table.md", "figure.png", "pictures.png"}


def test_the_random_policy_stands_beside_the_scores_of_the_game_alone():
    score, trial = Score(229.2, 1.0, 200.0, 250.0), SimpleNamespace(finished=False)
    cell, *_ = cells(Grid(axes={"rounds": [1]}))
    rows = [
        SimpleNamespace(cell=cell, trials=[trial], scores=dict.fromkeys(METRICS, known))
        for known in (score, None)
    ]
    drawn = {metric: results.series_of(Grid(), metric, rows).random for metric in METRICS}
    np.testing.assert_array_equal(drawn["eval/mean"], [229.2, nan])
    assert np.isnan(drawn["dream/mean"]).all()


def test_a_table_says_what_the_names_of_its_cells_do_not():
    axes = {"vision.beta": [1, 2], "recipe": {"old": {"rounds": 3}, "new": {"memory.steps": 7}}}
    grid = Grid(base={"env": "tiny", "rounds": 2, "vision.steps": 1}, axes=axes)
    words = ["trainer.workers=1", "vision.steps=2"]
    rows = [SimpleNamespace(cell=cell) for cell in cells(grid, words)]
    head, *lines = results.settings(rows).splitlines()
    assert head == "In every cell: `env=tiny vision.steps=2`."
    assert lines[:2] == ["- beta 1, old: `rounds=3`", "- beta 1, new: `rounds=2 memory.steps=7`"]
    alone = results.settings(rows[:1])
    assert alone == "In every cell: `env=tiny rounds=3 vision.steps=2 vision.beta=1`."


def test_cells_with_one_picture_share_it_under_what_they_have_in_common():
    made = cells(Grid(axes={"vision.beta": [1, 2], "x": {"a": {}, "b": {}}}))
    assert results.in_common(made[:1], made) == "beta 1, a"
    assert results.in_common(made[:2], made) == "beta 1"
    assert results.in_common(made[::2], made) == "a"
    assert results.in_common(made, made) == "every cell"
    assert results.in_common(made[1:], made) == "beta 1, b; beta 2, a; beta 2, b"


def test_cells_are_told_apart_by_the_games_and_seeds_that_both_have():
    generator = np.random.default_rng(0)
    games = generator.normal(800, 400, (3, 100))  # as of three trainings

    def row(name, returns, seeds=(0, 1, 2), **values):
        its = [
            SimpleNamespace(
                seed=seed, finished=True, fact=lambda m: 1.0, returns=lambda m, s=seed: returns[s]
            )
            for seed in seeds
        ]
        return SimpleNamespace(cell=SimpleNamespace(name=name, values=values), trials=its)

    better = games + generator.normal(30, 20, games.shape)
    rows = [row("good", better), row("plain", games), row("plain too", games, seeds=[2, 0])]
    (text,) = results.told_apart([*rows, row("other game", games + 99, env="carracing")])
    assert "1 of 1 pairs" in text and "at least one in 20 is" in text  # of two seeds none is
    assert f"- plain is below good by {results.shown(score_of_seeds(better - games))}" in text
    (text,) = results.told_apart([*rows[:2], row("worse", games - 50)])
    assert (
        "3 of 3 pairs" in text
        and "- worse is below good by" in text
        and "; plain by 50.0 ±" in text
    )
    assert results.told_apart([rows[0], row("other", games, seeds=[])]) == []


@pytest.mark.parametrize(
    "mean, text",
    [(12345.6, "12,346"), (229.24, "229.2"), (2, "2.000"), (0.0, "0.000"), (0.00123, "0.00123")],
)
def test_small_numbers_are_shown_with_more_decimals(mean, text):
    assert results.shown(Score(mean, nan, nan, nan)) == text


@pytest.mark.parametrize(
    "words, says",
    [
        ([], "name one grid"),
        (["a.yaml", "b.yaml"], "name one grid"),
        (["none.yaml"], "cannot read"),
        (["g.yaml", "seed=1"], "unknown key 'seed'; did you mean 'seeds'"),
        (["g.yaml", "vision.beta=7"], r"axis vision.beta has no point 7, but 0\.1, 1"),
        (["g.yaml", "vision.latents=1"], "unknown key 'vision.latents'"),
        (["g.yaml", "jobs=many"], "jobs"),
        (["g.yaml", "jbos=2"], "'jbos'; did you mean 'jobs'"),
        (["g.yaml", "jobs=-1"], "the nearest valid value is 0"),
    ],
)
def test_words_that_cannot_be_meant_are_refused(words, says, own_folder):
    (own_folder / "g.yaml").write_text(GRID)
    with pytest.raises(ConfigError, match=says):
        ablate(FAMILY, words)
    assert [path.name for path in own_folder.iterdir()] == ["g.yaml"]
