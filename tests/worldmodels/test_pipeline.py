"""The whole pipeline at its smallest, as a user runs it: to its end, again, changed, killed."""

import os
import re
import shutil
import signal
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from contents import hashes
from mlflow import MlflowClient
from omegaconf import OmegaConf
from safetensors.torch import load_file

from wm import WMError
from wm.collect import record
from wm.config import load
from wm.data import Latents
from wm.envs import VALIDATION_SEEDS, as_vector, held_out_seeds, make_env, training_seeds
from wm.episodes import EpisodeStore
from wm.evaluate import read_outcomes, read_returns, write_outcomes
from wm.files import sha256
from wm.stages import CHECKPOINTS, DONE
from wm.tracking import read_metrics
from wm.training import TrainerConfig
from wm.workers import Outcome
from wm.worldmodels import bundle, pipeline, report
from wm.worldmodels.agent import AgentPlayer, find_agent
from wm.worldmodels.pipeline import Config, stages
from wm.worldmodels.work import generation_seeds

GAMES = ("carracing", "takecover", "tiny")
SMOKE = ["scale=smoke", "trainer.workers=1"]
TINY = ["env=tiny", *SMOKE, "controller.generations=8"]  # long enough to be killed in


@dataclass(frozen=True)
class Finished:
    """What a finished `wm run` has left."""

    words: list[str]
    folder: Path  # where it was started
    output: str

    def graph(self, *changes):
        return stages(load(Config, [*self.words, f"runs={self.folder / 'made'}", *changes]))

    def stage(self, label, *changes):
        return next(stage for stage in self.graph(*changes) if stage.label == label)

    def parent(self, *changes):
        return find_parent(self.folder / "made", self.graph(*changes))


def find_parent(runs, graph):
    """The MLflow client and the parent run of a pipeline."""
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name != "Default")
    query = f"tags.`wm.pipeline` = '{graph[-1].fingerprint}'"
    (run,) = client.search_runs([experiment.experiment_id], query)
    return client, run


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory):
    """The three games' pipelines; they run side by side, since most of a run is imports."""
    words = {game: [f"env={game}", *SMOKE] for game in GAMES} | {"tiny": TINY}
    folders = {game: tmp_path_factory.mktemp(game) for game in GAMES}
    processes = {game: start(folders[game], "run", *words[game]) for game in GAMES}
    outputs = {game: process.communicate()[0] for game, process in processes.items()}
    for game, process in processes.items():
        assert process.returncode == 0, outputs[game]
    return {game: Finished(words[game], folders[game], outputs[game]) for game in GAMES}


@pytest.fixture
def tiny(finished):
    return finished["tiny"]


each_game = pytest.mark.parametrize("game", GAMES)


@each_game
def test_a_run_ends_with_the_score_on_the_held_out_seeds(game, finished):
    run = finished[game]
    assert all(stage.done for stage in run.graph())
    for title, label, name in (
        ("random policy", "baseline", "random"),
        ("our agent", "evaluate", "eval"),
    ):
        stage = run.stage(label)
        facts, returns = stage.record["facts"], read_returns(stage.folder / "episodes.csv")
        seeds = np.loadtxt(stage.folder / "episodes.csv", delimiter=",", skiprows=1, usecols=0)
        assert list(seeds) == list(held_out_seeds(2))
        assert facts[f"{name}/mean"] == pytest.approx(np.mean(returns))
        shown = re.search(rf"^{title} +(-?[\d.]+)", run.output, re.MULTILINE)
        assert float(shown[1]) == pytest.approx(np.mean(returns), abs=0.051)
    assert str(Path("made") / game / "report-") in run.output


def test_a_bundle_says_where_its_agent_comes_from(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "PRETRAINED", tmp_path)
    bundle.bundle([*tiny.words, f"runs={tiny.folder / 'made'}"])
    about = OmegaConf.load(tmp_path / "tiny" / "about.yaml")
    facts = tiny.stage("evaluate").record["facts"]
    assert about["results before it was halved"]["eval/mean"] == pytest.approx(facts["eval/mean"])
    assert about.config.seed == 0 and "scale=smoke" in about.command and about.versions.commit
    with pytest.raises(WMError, match="collect-0 is not done"):
        bundle.bundle([*tiny.words, "seed=1", f"runs={tiny.folder / 'made'}"])
    folder = tiny.stage("controller-0").folder
    path = folder / "agent" / "vision.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(folder / DONE)  # in this process it has been read before, and was sound
    try:
        with pytest.raises(WMError, match=r"vision.safetensors is damaged"):
            bundle.bundle([*tiny.words, f"runs={tiny.folder / 'made'}"])
    finally:
        path.write_bytes(whole)
        os.utime(folder / DONE)
    assert len(list((tmp_path / "tiny").iterdir())) == 6 and len(list(tmp_path.iterdir())) == 2


@each_game
def test_a_run_leaves_its_runs_folder_and_nothing_else(game, finished):
    assert os.listdir(finished[game].folder) == ["made"]


@each_game
def test_the_report_shows_the_score_and_refers_to_no_other_file(game, finished):
    run = finished[game]
    page = (run.stage("report").folder / "report.html").read_text()
    references = []

    class References(HTMLParser):
        def handle_starttag(self, tag, attributes):
            references.extend(v for key, v in attributes if key in ("src", "href", "srcset"))

    References().feed(page)
    kinds = [reference.split(";")[0] for reference in references]
    assert kinds.count("data:image/png") >= 5 and kinds.count("data:video/mp4") == 1
    assert len(kinds) == kinds.count("data:image/png") + kinds.count("data:video/mp4")
    assert "url(" not in page and "@import" not in page and "<script" not in page
    facts = run.stage("evaluate").record["facts"]
    assert f"{facts['eval/mean']:.1f} ± {facts['eval/std']:.1f}" in page


@pytest.mark.parametrize(
    ("words", "where"),
    [
        ([], "dream; chosen on validation seeds of the real game"),
        (["controller.keep=mean"], "dream"),
        (["tuning.generations=1"], "dream, then real game"),
        (["controller.fitness=real"], "real game"),
    ],
)
def test_the_report_says_where_c_was_evolved(words, where, tiny, tmp_path):
    write_outcomes(tmp_path / "episodes.csv", [Outcome(0, 1.0, 1, True)])
    numbers = ("mean", "std", "ci_low", "ci_high")
    facts = {f"{prefix}/{number}": 1.0 for prefix in ("random", "eval") for number in numbers}
    records = {label: {"facts": facts} for label in ("baseline", "evaluate")}
    config = tiny.stage("report", *words).config["config"]
    rows = report.measured(config, records, dict.fromkeys(records, tmp_path))
    assert [row["where"] for row in rows] == ["-", where]


def test_the_report_reads_what_it_is_said_to_read_and_nothing_else(tiny, tmp_path):
    stage, inputs = tiny.stage("report"), {}
    for label, needed in stage.inputs.items():
        inputs[label] = tmp_path / label
        inputs[label].mkdir()
        for name in (DONE, *stage.reads):
            if (needed.folder / name).is_file():
                shutil.copy(needed.folder / name, inputs[label])
    assert not list(tmp_path.rglob("*.npy")) and not list(tmp_path.rglob("*.safetensors"))
    run = SimpleNamespace(log_file=lambda path: None)
    report.write_report(tmp_path, inputs, run, TrainerConfig(), config=stage.config["config"])
    name = "report.html"
    assert (tmp_path / name).read_bytes() == (stage.folder / name).read_bytes()


@each_game
def test_mlflow_has_the_score_on_the_parent_and_a_child_for_every_stage(game, finished):
    run = finished[game]
    client, parent = run.parent()
    assert parent.info.status == "FINISHED"
    facts = run.stage("evaluate").record["facts"]
    for name in ("eval/mean", "eval/ci_low", "eval/ci_high"):
        assert parent.data.metrics[name] == facts[name]
    assert parent.data.metrics["cost/real_steps"] > 0
    assert parent.data.params["memory.mixtures"] == "5"
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = {
        child.info.run_name: child
        for child in client.search_runs([parent.info.experiment_id], query)
    }
    assert {stage.label for stage in run.graph()} <= set(children)
    assert {child.info.status for child in children.values()} == {"FINISHED"}
    controller = children["controller-0"].info.run_id
    assert [file.path for file in client.list_artifacts(controller, "agent")]
    assert "controller/fitness_mean" in children["controller-0"].data.metrics


def test_running_again_skips_every_stage(tiny, capsys):
    graph = tiny.graph()
    before = {stage.label: (stage.folder / DONE).stat().st_mtime_ns for stage in graph}
    pipeline.run([*tiny.words, f"runs={tiny.folder / 'made'}"])
    output = capsys.readouterr().out
    for stage in graph:
        assert f"{stage.label}: done before" in output
        assert (stage.folder / DONE).stat().st_mtime_ns == before[stage.label]
    assert output.splitlines()[-6:-2] == tiny.output.splitlines()[-6:-2]  # the same table


@pytest.mark.parametrize(
    "change, again",
    [
        ("runs=elsewhere", set()),
        ("trainer.workers=2", set()),
        ("minutes=9", set()),
        ("evaluate.episodes=3", {"baseline", "evaluate", "report"}),
        ("evaluate.reconstructed=1", {"baseline", "evaluate", "report"}),
        ("controller.temperature=1.3", {"controller-0", "evaluate", "report"}),
        ("memory.mixtures=3", {"memory-0", "controller-0", "evaluate", "report"}),
        ("vision.latent=9", {"vision-0", "memory-0", "controller-0", "evaluate", "report"}),
        ("rounds=2", {"evaluate", "report"}),
        ("collect.later_episodes=7", {"report"}),
        ("vision.later_steps=7", {"report"}),
        ("memory.later_steps=7", {"report"}),
        ("tuning.population=6", {"report"}),
        ("tuning.generations=1", {"evaluate", "report"}),
    ],
)
def test_a_change_concerns_its_stage_and_those_below(change, again, tiny):
    before = {stage.label: stage.fingerprint for stage in tiny.graph()}
    after = {stage.label: stage.fingerprint for stage in tiny.graph(change)}
    assert {label for label in before if after[label] != before[label]} == again


def test_another_world_concerns_the_scores_alone():
    made = [
        {stage.label: stage for stage in stages(load(Config, ["env=takecover", *SMOKE, *words]))}
        for words in ([], ["evaluate.world.skill=4"], ["evaluate.world.skill=5"])
    ]
    before, same, after = ({label: s.fingerprint for label, s in g.items()} for g in made)
    assert before == same
    scores = {"baseline", "evaluate", "report"}
    assert {label for label in before if after[label] != before[label]} == scores
    for label in ("baseline", "evaluate"):  # as it was before there were other worlds
        assert made[0][label].config["evaluation"] == {"episodes": 2}
        assert made[2][label].config["evaluation"]["world"]["skill"] == 5


@pytest.mark.parametrize(
    "words, scored",
    [
        (["rounds=1"], "controller-0"),
        (["rounds=2", "controller.keep=mean"], "controller-1"),
        (["rounds=2", "tuning.generations=1"], "controller-2"),
    ],
)
def test_without_a_choice_the_last_c_is_scored(words, scored, tiny):
    assert pipeline.scored_controller(tiny.graph(*words)).label == scored
    with pytest.raises(WMError, match=r"there is no choice in this pipeline"):
        pipeline.run_only("choice", [*tiny.words, *words])


def test_with_rounds_the_best_is_scored(tiny):
    chosen = pipeline.scored_controller(tiny.graph("rounds=2"))
    assert chosen.label == "choice"
    assert list(chosen.inputs) == ["controller-0", "controller-1"]


def test_tuning_goes_on_in_the_real_game_with_the_same_models_and_is_scored(tiny):
    words = "tuning.generations=3", "tuning.population=6"
    first, tuned = tiny.stage("controller-0", *words), tiny.stage("controller-1", *words)
    assert first.fingerprint == tiny.stage("controller-0").fingerprint
    assert tuned.inputs["controller"].label == "controller-0"
    assert {label for label in tuned.inputs} == {"collect-0", "vision", "memory", "controller"}
    settings = tuned.config["config"]["controller"]
    names = "fitness", "generations", "population", "episodes", "validate_every"
    assert [settings[name] for name in names] == ["real", 3, 6, 4, 5]
    assert first.config["config"]["controller"]["population"] != 6
    later = "memory.later_steps=7", "vision.later_steps=7"  # after one round there is none
    assert tiny.stage("controller-1", *words, *later).fingerprint == tuned.fingerprint
    judged = tiny.stage("evaluate", *words).inputs
    assert [stage.label for stage in judged.values()] == ["controller-1"]


def test_ppo_goes_on_in_the_real_game_and_counts_its_steps(tiny, start):
    tuning = "tuning.generations=2", "tuning.population=4", "tuning.episodes=3"
    words = "controller.optimizer=ppo", "controller.hidden=3", "controller.generations=2", *tuning
    process = start(tiny.folder, "run", *tiny.words, *words)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    tuned = tiny.stage("controller-1", *words)
    history = read_metrics(tuned.folder)
    steps = history["controller/fitness_steps"]
    assert list(steps) == [0, 1] and min(steps.values()) >= 4 * 3  # episodes of some steps each
    everything = sum(steps.values()) + sum(history["controller/real_steps"].values())
    assert tuned.record["facts"]["controller/played_steps"] == everything
    dreamer = tiny.stage("controller-0", *words).folder
    dreamt = read_metrics(dreamer)
    assert "controller/fitness_steps" not in dreamt
    before, after = (load_file(f / "noise_and_critic.safetensors") for f in (dreamer, tuned.folder))
    assert before["spread"].exp().mean().item() == pytest.approx(dreamt["controller/sigma"][1])
    for name, value in before.items():  # six gradients of at most 0.001 each, not drawn anew
        torch.testing.assert_close(after[name], value, atol=0.02, rtol=0)


@pytest.mark.parametrize("change", ["seed=1", "collect.policy=uniform"])
def test_other_data_make_everything_new_but_the_random_policys_score(change, tiny):
    before = {stage.label: stage.fingerprint for stage in tiny.graph()}
    after = {stage.label: stage.fingerprint for stage in tiny.graph(change)}
    assert {label for label in before if after[label] == before[label]} == {"baseline"}


RESULTS = {  # of stages: what others read or what is reported, apart from times
    "collect-0": "shard-*/*",
    "vision-0": "latents/*.npy",
    "controller-0": "*.safetensors",
    "baseline": "*.csv",
    "evaluate": "*.csv",
}


def test_two_processes_make_the_same_as_one(finished, start, tmp_path):
    games = ("takecover", "tiny")
    processes = [
        start(tmp_path, "run", *finished[game].words, "trainer.workers=2") for game in games
    ]
    for game, process in zip(games, processes, strict=True):
        output = process.communicate()[0]
        assert process.returncode == 0, output
        for label, names in RESULTS.items():
            folder = finished[game].stage(label).folder
            made = results(folder, names)
            assert made and results(tmp_path / "made" / game / folder.name, names) == made, label


def results(folder, names):
    return {str(path.relative_to(folder)): sha256(path) for path in folder.glob(names)}


def test_other_mixtures_make_new_folders_for_memory_and_below_only(tiny):
    made = tiny.folder / "made" / "tiny"
    before = {path.name: hashes(path) for path in made.iterdir()}
    change = "memory.mixtures=3"
    pipeline.run([*tiny.words, f"runs={tiny.folder / 'made'}", change])
    new = {path.name for path in made.iterdir()} - set(before)
    below = ("memory-0", "controller-0", "evaluate", "report")
    assert new == {tiny.stage(label, change).folder.name for label in below}
    assert before.items() <= {path.name: hashes(path) for path in made.iterdir()}.items()
    assert tiny.parent(change)[1].info.run_id != tiny.parent()[1].info.run_id


def test_a_second_round_collects_with_the_controller_and_keeps_all_data(tiny):
    change = "rounds=2"
    pipeline.run([*tiny.words, f"runs={tiny.folder / 'made'}", change])
    config = load(Config, tiny.words)
    collect, vision, controller = (
        tiny.stage(label, change) for label in ("collect-1", "vision-1", "controller-0")
    )
    assert controller.folder == tiny.stage("controller-0").folder  # the first round is shared

    seed = training_seeds(config.seed, 1, 1)[0]
    player = AgentPlayer(controller.folder / "agent", noise=config.collect.noise)
    (expected,) = record(as_vector(make_env(config.env)), player, [seed])
    actions = np.load(collect.folder / f"shard-{seed:010d}" / "actions.npy")
    np.testing.assert_array_equal(actions[: len(expected.actions)], expected.actions)

    assert set(vision.record["inputs"]) == {"collect-0", "collect-1", "vision"}
    frames = EpisodeStore([tiny.stage("collect-0").folder, collect.folder]).total_frames
    assert len(Latents(vision.folder / "latents").mean) == frames
    parent = tiny.parent(change)[1]
    choice = tiny.stage("choice", change)
    played = [o for path in choice.folder.glob("*/episodes.csv") for o in read_outcomes(path)]
    assert len(played) == 2 * 2  # rounds and episodes
    facts = {s.label: s.record["facts"] for s in tiny.graph(change)}
    steps = sum(outcome.steps for outcome in played)
    steps += sum(facts[f"collect-{r}"]["collect/steps"] for r in (0, 1))
    steps += sum(facts[f"controller-{r}"]["controller/played_steps"] for r in (0, 1))
    assert parent.data.metrics["cost/real_steps"] == steps
    found = find_agent(parent.info.run_id, tiny.folder / "made")
    assert hashes(found) == hashes(choice.folder / "agent")


def test_an_agent_is_scored_by_the_id_of_its_run(tiny, capsys):
    client, parent = tiny.parent()
    words = [*SMOKE, f"runs={tiny.folder / 'made'}"]
    pipeline.evaluate_run(parent.info.run_id, words)
    facts = tiny.stage("evaluate").record["facts"]  # the same agent, seeds and game
    shown = re.search(r"^our agent +([\d.]+) +([\d.]+)", capsys.readouterr().out, re.MULTILINE)
    assert [float(n) for n in shown.groups()] == [
        round(facts[key], 1) for key in ("eval/mean", "eval/std")
    ]
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = client.search_runs([parent.info.experiment_id], query)
    scored = [child.data.metrics.get("eval/mean") for child in children]
    assert scored.count(facts["eval/mean"]) == 2
    after = client.get_run(parent.info.run_id).info
    assert (after.status, after.end_time) == ("FINISHED", parent.info.end_time)


@pytest.mark.parametrize("part", ["agent", ""])
def test_an_agent_scored_from_its_folder_is_tracked_as_what_it_is(part, tiny):
    controller = tiny.stage("controller-0").folder
    runs = tiny.folder / f"elsewhere{part}"
    pipeline.evaluate_run(str(controller / part), [*SMOKE, f"runs={runs}"])
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    (parent,) = (run for run in found if "mlflow.parentRunId" not in run.data.tags)
    assert parent.info.run_name == f"tiny, {controller.name}/agent"
    assert parent.data.params["agent"] == str(controller / part)
    assert parent.data.params["memory.mixtures"] == "5" and "seed" not in parent.data.params
    facts = tiny.stage("evaluate").record["facts"]
    assert parent.data.metrics["eval/mean"] == facts["eval/mean"]


@dataclass(frozen=True)
class Interrupted:
    """A run that got a SIGTERM in vision, and then, repeated, a SIGKILL in the controller."""

    folder: Path
    code: int  # of the terminated run
    done_when_terminated: list[str]
    status: str  # of the terminated run in MLflow
    done_when_killed: list[str]


@pytest.fixture(scope="module")
def interrupted(start, wait_until, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    made = folder / "made" / "tiny"
    graph = stages(load(Config, [*TINY, f"runs={folder / 'made'}"]))

    def done():
        return sorted(path.parent.name.rsplit("-", 1)[0] for path in made.glob(f"*/{DONE}"))

    process = start(folder, "run", *TINY)
    wait_until(lambda: list(made.glob("vision-*")), process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    terminated, done_when_terminated = process.returncode, done()
    _, parent = find_parent(folder / "made", graph)

    process = start(folder, "run", *TINY)
    step = f"controller-*/{CHECKPOINTS}/step=2.ckpt"
    wait_until(lambda: list(made.glob(step)), process)
    process.kill()
    process.communicate(timeout=60)  # until its workers, who share its output, are gone too
    return Interrupted(folder, terminated, done_when_terminated, parent.info.status, done())


def test_a_terminated_run_exits_143_with_its_stage_not_done(interrupted):
    assert interrupted.code == 128 + signal.SIGTERM
    assert interrupted.done_when_terminated == ["collect-0"]
    assert interrupted.status == "KILLED"


def test_a_run_that_was_killed_and_repeated_ends_as_if_it_had_not_been(interrupted, tiny):
    assert interrupted.done_when_killed == ["collect-0", "memory-0", "vision-0"]
    runs = interrupted.folder / "made"
    pipeline.run_only("controller", [*TINY, f"runs={runs}"])
    for label, name in (
        ("vision-0", "vision.safetensors"),
        ("memory-0", "memory.safetensors"),
        ("controller-0", "controllers.safetensors"),
    ):
        folder = tiny.stage(label).folder
        expected = load_file(folder / name)
        tensors = load_file(runs / "tiny" / folder.name / name)
        assert expected.keys() == tensors.keys()
        assert all(expected[key].equal(tensors[key]) for key in expected), name


def test_stage_by_stage_a_pipeline_ends_with_the_scores_of_a_run(interrupted, tiny, capsys):
    words, statuses = [*TINY, f"runs={interrupted.folder / 'made'}"], []
    for name in ("controller", "evaluate", "report"):
        pipeline.run_only(name, words)
        _, parent = find_parent(interrupted.folder / "made", stages(load(Config, words)))
        statuses.append(parent.info.status)
    assert statuses == ["SCHEDULED", "SCHEDULED", "FINISHED"]
    mean = tiny.stage("evaluate").record["facts"]["eval/mean"]
    shown = re.search(r"^our agent +([\d.]+)", capsys.readouterr().out, re.MULTILINE)
    assert float(shown[1]) == round(mean, 1)
    assert parent.data.metrics["eval/mean"] == mean


def test_no_candidate_is_tried_on_a_seed_that_others_are_judged_by():
    drawn = {
        tuple(generation_seeds(16, seed, round, generation))
        for seed in range(3)
        for round in range(2)
        for generation in range(50)
    }
    assert len(drawn) == 300  # each generation has seeds of its own
    assert all(0 <= seed < VALIDATION_SEEDS for seeds in drawn for seed in seeds)
